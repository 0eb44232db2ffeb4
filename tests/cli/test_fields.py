import pytest

from qat.cli.fields import FIELDS, KNOBS, at, check_fields, out_of_range
from qat.cli.schema import build_schema
from qat.cli.tree import Tree
from qat.cli.verbs import VERBS

OBSERVERS = {
    "points": ([1, 80], [0, None]),
    "smallest": ([0.2, 1], [0, 1.1]),
    "norm": ([2.4], [0, float("nan")]),
    "decay": ([0, 0.9], [1, -0.1]),
    "percent": ([99.9, 100], [50, 101]),
}


def nested(path, value):
    for word in reversed(path.split(".")):
        value = {word: value}
    return value


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("seed", [0, 1234], [-1, True, 2**32, "a", None]),
        ("threads", [None, 1], [0, 1.5]),
        ("device", ["auto", "cpu", "cuda", "cuda:1"], ["gpu", "cuda:", "mps", 0, None]),
        ("evaluation.windows", [None, 3], [0, -1]),
        ("evaluation.seq_len", [2, 512], [1, 0]),
        ("export.dtype", ["bfloat16", "float16", "float32"], ["fp16", "float64", None]),
        ("export.target", [None, "vllm", "sglang", "transformers", "llamacpp"], ["vlm", "", 1]),
        ("optim.lr", [1e-4, 1], [0, -1, float("inf"), float("nan"), "a", True, None]),
        ("optim.weight_decay", [0, 0.1], [-1, float("inf"), None]),
        ("trainer.clip", [None, 1, 0.5], [0, -1, "a"]),
        ("adapter.rank", [1, 64], [0, -1, 1.5, True, None]),
        ("adapter.alpha", [0.5, 16], [0, -1, float("inf"), "a", None]),
        ("adapter.dropout", [0, 0.9], [1, -0.1, None]),
        ("adapter.group_size", [1, 64], [0, 1.5, None]),
        ("optim.warmup", [0, 0.1, 1.0], [-0.1, 1.1]),
        ("trainer.precision", ["auto", "bf16-mixed"], ["bf16", 16, "bf16-true"]),
        ("format.name", ["compressed_tensors"], ["base", "ggff", "targets", "ct_args", None]),
        ("server.port", [0, 8000], [-1, 65536]),
        ("server.max_queue", [0, 8], [-1, 1.5, None]),
        ("server.drain_seconds", [0, 2.5], [-1, None, float("inf")]),
        ("sampling.top_p", [1, 0.9], [0, 1.1]),
        ("sampling.temperature", [0, 0.7], [-0.1]),
        ("model.path", [None, "a"], ["", 3]),
        ("prompts", [["a", "b", "c"]], [[], ["a", "b"], ["a", "b", ""], "a", [1, 2, 3]]),
        ("certificate.new_tokens", [32, 64], [31, 0]),
        ("split", ["test", "validation"], ["train"]),
        ("budget", [3.25, 3], [0, -1, "a", None]),
        ("bits", [[2, 8], [4, 3, 2]], [[4], [2, 9], [1, 2], [2, 2], [2, 3.5], 4, None]),
        ("unit", ["linear", "stage", "block", "kind"], ["layer", None]),
        ("metric", ["kl", "nll"], ["ppl"]),
        ("measured", [None, "latest"], ["", 3]),
        ("logger.wandb.mode", ["auto", "online"], ["dryrun"]),
    ],
)
def test_ranges(path, good, bad):
    for value in good:
        assert list(check_fields(nested(path, value))) == []
    for value in bad:
        (problem,) = check_fields(nested(path, value))
        assert problem.where == path
        assert "expected" in problem.text


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("damping", [0, 0.01, 2], [-0.5, float("nan"), float("inf"), "a", None]),
        ("asymmetry", [0, 0.25, 1], [-1, float("nan"), float("inf"), None]),
        ("block_size", [1, 128], [0, -64, 1.5, None]),
        ("grid", [0, 20], [-3, 2.5, None]),
        ("alphas", [[0.5], [0, 1]], [[], [2], [float("nan")], 0.5, None]),
        ("epochs", [1], [0, None]),
        ("batch_size", [1], [0, None]),
        ("lr", [None, 1e-3], [0, -1, float("nan"), float("inf")]),
        ("scale_lr", [None, 1e-3], [0, "a"]),
        ("seed", [0], [-1, None]),
        *((f"{place}.{key}", *tried) for place in ("observer", "input_observer") for key, tried in OBSERVERS.items()),
    ],
)
def test_knobs_of_methods(path, good, bad):
    for value in good:
        assert list(out_of_range(nested(path, value), KNOBS)) == []
    for value in bad:
        ((where, text),) = out_of_range(nested(path, value), KNOBS)
        assert where == path
        assert "expected" in text


@pytest.mark.parametrize("place", ["observer", "input_observer"])
@pytest.mark.parametrize("key", OBSERVERS)
def test_ranges_of_observers(place, key):
    good, bad = OBSERVERS[key]
    assert [list(check_fields(nested(f"{place}.{key}", value))) for value in good] == [[]] * len(good)
    assert all(list(check_fields(nested(f"{place}.{key}", value))) for value in bad)


def test_every_knob_is_tried_above():
    (mark,) = test_knobs_of_methods.pytestmark
    assert {path for path, _, _ in mark.args[1]} == set(KNOBS)


def test_keys_that_are_not_there_or_not_known_yet_are_passed_over():
    assert list(check_fields({"evaluation": None, "optim": {"lr": "???"}, "logger": {"wandb": None}})) == []


def test_eval_takes_the_sizes_of_the_run_where_it_names_none():
    sizes = {"evaluation": {"windows": None, "seq_len": None, "batch_size": None}}
    assert list(check_fields({"verb": "eval"} | sizes)) == []
    assert [p.where for p in check_fields({"verb": "run"} | sizes)] == ["evaluation.seq_len", "evaluation.batch_size"]
    assert [p.where for p in check_fields({"verb": "eval", "evaluation": {"seq_len": 1}})] == ["evaluation.seq_len"]


def test_every_field_is_a_key_of_some_verb():
    found: set[str] = set()
    for verb in VERBS.values():
        if verb.primary:
            _collect(build_schema(verb, Tree.of([])), "", found)
    assert set(FIELDS) - found == set()


def _collect(node, path, found):
    for key, child in node.children.items():
        found.add(f"{path}{key}")
        for default in child.defaults:
            _collect_values(default, f"{path}{key}.", found)
        _collect(child, f"{path}{key}.", found)


def _collect_values(value, path, found):
    for key, child in value.items() if isinstance(value, dict) else ():
        found.add(f"{path}{key}")
        _collect_values(child, f"{path}{key}.", found)


def test_at_reads_a_path_or_none():
    assert at({"a": {"b": 1}}, "a.b") == 1
    assert at({"a": 3}, "a.b.c") is None
