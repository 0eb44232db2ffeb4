import pytest

from qat.report.runs import differing, flat, incomparable, read


def test_a_run_directory_is_read(write):
    run = read(write("a"))
    assert run.name == "quick/a"
    assert run.config["optim.lr"] == 1e-4
    assert run.config["optim.betas"] == [0.9, 0.95]
    assert run.facts["status"] == "finished"
    assert list(run.arms) == ["fp", "gptq", "qat"]


def test_a_link_is_read_as_what_it_points_to(write, tmp_path):
    path = write("a")
    (tmp_path / "latest").symlink_to(path)
    assert read(tmp_path / "latest").name == "quick/a"
    assert read(str(tmp_path / "latest")).path == path


def test_what_is_no_run_is_refused(tmp_path, write):
    with pytest.raises(ValueError, match="nothing: no run directory"):
        read(tmp_path / "nothing")
    path = write("a")
    (path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="a: no run directory"):
        read(path)


def test_a_run_without_result_says_how_to_get_one(write):
    path = write("a")
    (path / "summary.json").unlink()
    with pytest.raises(ValueError, match="no result yet; repeat its command to finish it"):
        read(path)


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None, "g": {}}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": None,
        "g": {},
    }


def test_only_keys_that_differ_are_named(write):
    a = read(write("a"))
    b = read(write("b", config={"optim.lr": 3e-4, "seed": 2, "optim.extra": "x"}))
    assert differing([a, b]) == {"seed": [1, 2], "optim.lr": [1e-4, 3e-4], "optim.extra": [None, "x"]}
    assert differing([a, a]) == {}


def test_keys_that_say_where_and_how_but_not_what_do_not_count(write):
    changes = {"runs": "elsewhere", "resume": "never", "choices.recipe": "w3", "logger.wandb": {"mode": "auto"}}
    assert differing([read(write("a")), read(write("b", config=changes))]) == {}


def test_equal_runs_can_be_compared(write):
    assert incomparable([read(write("a")), read(write("b", config={"optim.lr": 1.0}))]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"facts": {"data.fingerprint": "beef" * 16}}, "data (fingerprints) differ: f00df00df00d, beefbeefbeef"),
        ({"config": {"model.name": "other"}}, "models differ"),
        ({"config": {"model.path": "/elsewhere"}}, "models differ"),
        ({"summary": {"arms.fp.tokens": 62}}, "evaluation tokens differ: 124, 62"),
        ({"config": {"evaluation.seq_len": 64}}, "sequence lengths differ: 32, 64"),
        ({"facts": {"device": "NVIDIA Thing"}}, "kinds of device (fp32 on a CPU, bf16 on a GPU) differ"),
        ({"facts": {"status": "running"}}, "quick/b is not finished"),
        ({"summary": {"export.verified": False}}, "quick/b: the export is not verified"),
        ({"config": {"choices.experiment": "smoke"}}, "quick/b is a smoke run"),
    ],
)
def test_each_reason_for_doubt_is_a_sentence(write, changes, words):
    (reason,) = incomparable([read(write("a")), read(write("b", **changes))])
    assert reason.startswith(words)


def test_every_reason_is_given(write):
    b = write("b", config={"evaluation.seq_len": 64}, facts={"status": "running"}, summary={"arms.fp.tokens": 1})
    assert len(incomparable([read(write("a")), read(b)])) == 3
