import pytest

from qat.cli.fields import FIELDS, at, check_fields
from qat.cli.schema import build_schema
from qat.cli.tree import Tree
from qat.cli.verbs import VERBS


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
        ("optim.lr", [1e-4, 1], [0, -1, "a", True, None]),
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
