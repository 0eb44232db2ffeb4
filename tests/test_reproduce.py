"""The quality table's cells are shared out: none twice, none before what it needs, none lost with a process."""

import multiprocessing
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
W4, CHANNEL = "w4a16_g64", "w4a16_channel"


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import quality_plan

    return quality_plan


@pytest.fixture
def board(plan, tmp_path):
    def make(arms, recipes=(W4,), seeds=(1,)):
        (tmp_path / "work").mkdir(exist_ok=True)
        return plan.Board(tmp_path / "results.json", tmp_path / "work", plan.plan(list(recipes), arms, list(seeds)))

    return make


def done(board, claim):
    board.add({"recipe": claim.cell.recipe, "arm": claim.cell.arm, "seed": claim.cell.seed}, {"settings": {"a": 1}})
    claim.release()


def test_what_does_not_depend_on_seed_or_recipe_is_there_once(plan):
    cells = plan.plan([W4, CHANNEL], list(plan.ARMS), [1, 2, 3])
    assert len(set(cells)) == len(cells)
    assert [cell for cell in cells if cell.arm in ("fp", "ft_fp", "rtn")] == [
        ("-", "fp", 0), ("-", "ft_fp", 1), (W4, "rtn", 0), (CHANNEL, "rtn", 0), ("-", "ft_fp", 2), ("-", "ft_fp", 3)
    ]  # fmt: skip
    assert [cell.seed for cell in cells if cell.arm == "qat"] == [1, 1, 2, 3]
    assert {cell.recipe for cell in cells if cell.arm == "autoround"} == {W4}


def test_no_cell_is_given_twice_and_done_ones_never(board):
    ours = board(["fp", "rtn", "gptq"])
    claims = [ours.claim("ptq") for _ in range(4)]
    assert [claim and claim.cell.arm for claim in claims] == ["fp", "rtn", "gptq", None]
    assert not ours.finished("ptq")
    claims[1].release()  # not done
    again = ours.claim("ptq")
    assert again.cell == claims[1].cell
    for claim in (claims[0], again, claims[2]):
        done(ours, claim)
    assert ours.claim("ptq") is None
    assert ours.finished("ptq")
    assert ours.finished("trained")


def test_a_cell_waits_for_what_it_needs_and_falls_with_it(board):
    ours = board(["blockap", "blockap_qat", "rtn"])
    first = ours.claim("trained")
    assert first.cell.arm == "blockap"
    assert ours.claim("trained") is None, "PTQ cells are for the others while something trains"
    assert ours.claim("ptq").cell.arm == "rtn"
    ours.fail(first.cell, "ValueError: as it is")
    first.release()
    assert ours.claim("trained") is None
    assert {cell.arm for cell in ours.pending()} == {"rtn"}
    assert list(ours.failures().values()) == ["ValueError: as it is"]
    ours.forgive()
    first = ours.claim("trained")
    done(ours, first)
    assert ours.claim("trained").cell.arm == "blockap_qat"


def test_what_is_not_asked_for_is_not_waited_for(board):
    assert board(["blockap_qat"]).claim("trained").cell.arm == "blockap_qat"


def test_a_claim_dies_with_its_process(board):
    ours = board(["rtn"])
    process = multiprocessing.get_context("fork").Process(target=ours.claim, args=("ptq",))
    process.start()
    process.join()
    assert ours.claim("ptq").cell.arm == "rtn"


@pytest.mark.whole
def test_every_kind_of_cell_composes(plan, tmp_path):
    for name in ("t", "g", "m"):
        (tmp_path / name).mkdir()
    paths = {"tokens": str(tmp_path / "t"), "generated": str(tmp_path / "g"), "work": str(tmp_path)}
    given = Namespace(**paths, more=[str(tmp_path / "m")], overrides=["optim.lr=1e-3"])
    for cell in plan.plan([W4], list(plan.ARMS), [1]) + plan.plan(list(plan.RECIPES), ["qat"], [1]):
        config = plan.composed(cell, given)
        assert config["optim"]["lr"] == 1e-3
        more = [paths["tokens"]] * (plan.DOCS - 1) + [paths["generated"], *given.more]
        assert config["data"]["extra"] == (more if cell.arm in plan.TRAINED else [])
    with pytest.raises(ValueError, match=r"optim\.nonsense"):
        plan.composed(cell, Namespace(**(vars(given) | {"overrides": ["optim.nonsense=1"]})))


def test_results_are_replaced_as_a_whole_and_meta_adds_up(board, tmp_path):
    ours = board(["rtn", "gptq"])
    first = {"recipe": W4, "arm": "rtn", "seed": 0, "settings": "a", "windows": {"nll": [1.0]}}
    ours.add(first, {"settings": {"a": [1]}, "device": "x"})
    ours.add({"recipe": W4, "arm": "gptq", "seed": 1, "settings": "b"}, {"settings": {"b": [2]}, "device": "y"})
    import results

    content = results.read(ours.file)
    assert content["meta"] == {"settings": {"a": [1], "b": [2]}, "device": "y"}
    assert [row["arm"] for row in content["rows"]] == ["rtn", "gptq"]
    assert [line for line in ours.file.read_text().splitlines() if line.count("recipe") > 1] == []


def test_a_cell_of_other_settings_is_made_again_and_takes_the_old_ones_place(plan, tmp_path):
    (cell,) = plan.plan([W4], ["gptq"], [1])
    boards = [plan.Board(tmp_path / "r.json", tmp_path, [cell], {cell: sha}) for sha in ("old", "new")]
    boards[0].add({**cell._asdict(), "settings": "old"}, {"settings": {"old": "x"}})
    assert [board.done() for board in boards] == [{cell}, set()]
    boards[1].add({**cell._asdict(), "settings": "new"}, {"settings": {"new": "y"}})
    assert [board.done() for board in boards] == [set(), {cell}]
    assert plan.read(tmp_path / "r.json")["meta"]["settings"] == {"new": "y"}


def test_what_was_tried_stays_beside_what_is_tried_now(plan, tmp_path):
    (cell,) = plan.plan([W4], ["qat"], [1])
    boards = [plan.Board(tmp_path / "r.json", tmp_path, [cell], {cell: sha}, beside=True) for sha in ("a", "b")]
    claims = [board.claim("trained") for board in boards]
    assert None not in claims, "settings are under way beside each other"
    assert boards[0].claim("trained") is None
    for board, claim, sha in zip(boards, claims, "ab", strict=True):
        for _ in range(2):  # made again, in its own place
            board.add({**cell._asdict(), "settings": sha}, {"settings": {sha: "x"}})
        claim.release()
    assert [board.done() for board in boards] == [{cell}, {cell}]
    content = plan.read(tmp_path / "r.json")
    assert [row["settings"] for row in content["rows"]] == ["a", "b"]
    assert content["meta"]["settings"] == {"a": "x", "b": "x"}
    boards[0].fail(cell, "ValueError: as it is")
    assert [board.failures() for board in boards] == [{cell: "ValueError: as it is"}, {}]


def test_settings_are_known_by_what_the_file_says_and_not_by_where_the_model_lies(plan):
    import hashlib

    cell = plan.Cell(W4, "qat", 1)
    here, there = (Namespace(overrides=[f"model.path=/{place}/m.gguf", "optim.lr=1e-3"]) for place in "ab")
    assert plan.digest(cell, here) == plan.digest(cell, there)
    assert plan.digest(cell, here) != plan.digest(cell, Namespace(overrides=[]))
    assert plan.digest(cell, here) == hashlib.sha256(plan.written(cell, here).encode()).hexdigest()[:12]
    assert "optim.lr=2e-4" in plan.written(cell, here)
    assert "optim.lr" not in plan.written(plan.Cell(W4, "gptq", 1), Namespace(overrides=[]))  # it does not train


def test_every_row_of_the_file_is_known_by_its_settings(plan):
    import hashlib

    from results import read

    content = read(ROOT / "scripts/results/quality.json")
    known = content["meta"]["settings"]
    assert all(hashlib.sha256(text.encode()).hexdigest()[:12] == sha for sha, text in known.items())
    assert {row["settings"] for row in content["rows"]} == set(known)
    given = Namespace(overrides=[])
    for row in content["rows"]:
        cell = plan.Cell(row["recipe"], row["arm"], row["seed"])
        assert plan.digest(cell, given) == row["settings"], f"{cell} is not what the plan has now"


def test_what_was_tried_is_known_by_its_settings_and_validation_alone_judged_it(plan):
    import hashlib

    from results import read

    content = read(ROOT / "scripts/results/tuning.json")
    known = content["meta"]["settings"]
    assert all(hashlib.sha256(text.encode()).hexdigest()[:12] == sha for sha, text in known.items())
    assert {row["settings"] for row in content["rows"]} == set(known)
    assert not [key for row in content["rows"] for key in row if key in ("kl", "nll", "ppl", "top1_agree", "windows")]


def test_tuning_is_judged_on_validation_alone(plan):
    from quality_cells import PROSE, Cells

    class Text:
        def windows(self, split, size, limit=None):
            return [(split, size, limit)] * 3

    bench = Namespace(config={"evaluation": {"seq_len": 8, "windows": 2}})
    said = {}
    for tune in (False, True):
        cells = Cells(Namespace(work="w", commit="c", tune=tune))
        cells.__dict__["_texts"] = {name: Text() for name in ("test", "generated", *PROSE)}
        said[tune] = cells._windows(bench)
    assert said[True] == {"validation": [("validation", 8, None)] * 2}
    assert set(said[False]) == {"test", "generated", *PROSE, "validation"}
    assert said[False]["web"][0] == ("test", 8, 2)


@pytest.mark.parametrize("tune", [False, True])
def test_what_was_tried_and_the_table_do_not_share_a_file(plan, monkeypatch, tmp_path, tune):
    import quality
    import results

    monkeypatch.setattr(quality, "composed", lambda *_: {})
    monkeypatch.setattr(quality, "share", lambda board, *_: boards.append(board) or 0)
    boards, file = [], tmp_path / "r.json"
    argv = ["quality.py", "--json", str(file), "--recipes", W4, "--arms", "rtn", "--work", str(tmp_path), "--gpus", "0"]
    argv += [word for name in ("tokens", "generated", "prose") for word in (f"--{name}", str(tmp_path))]
    monkeypatch.setattr("sys.argv", [*argv, *(["--tune"] if tune else [])])
    for row in ({}, {"kl_validation": 1.0} | ({} if tune else {"kl": 1.0})):
        results.write(file, {"meta": {}, "rows": [row] if row else []})
        with pytest.raises(SystemExit, match="0"):
            quality.main()
    assert [board.beside for board in boards] == [tune, tune]
    results.write(file, {"meta": {}, "rows": [{"kl_validation": 1.0} | ({"kl": 1.0} if tune else {})]})
    with pytest.raises(SystemExit, match=r"r\.json: its rows are judged on "):
        quality.main()
    assert len(boards) == 2


def test_a_row_shows_what_it_has(plan, monkeypatch, tmp_path, capsys):
    import lanes

    board = plan.Board(tmp_path / "r.json", tmp_path, plan.plan([W4], ["rtn"], [1]))
    monkeypatch.setattr("os.environ", {})
    lanes._work("ptq", "", 1, float("inf"), board, lambda: lambda cell: (cell._asdict() | {"b": 2.0}, {}), ("a", "b"))
    assert capsys.readouterr().out.split()[1:] == [f"{W4}.rtn.0", "b", "2.0000"]
