"""An arm becomes a checkpoint with a certificate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qat.cli.beside import CARD, launch, write_beside
from qat.cli.rundir import versions
from qat.cli.serving import served
from qat.cli.workbench import Workbench, linears
from qat.data.text import tokenizer_digest
from qat.engine.loader import FORMATS
from qat.evaluation import foreign, reference
from qat.evaluation.precision import compared_in
from qat.evaluation.reference import Sequence
from qat.evaluation.verify import issue, verify
from qat.formats.base import unquantized_state
from qat.numerics.qtensor import QuantizedTensor
from qat.report.card import card
from qat.report.launch import Launch


def references(bench: Workbench, graph: PreTrainedModel) -> list[Sequence]:
    """Reference logits of a graph on the configured prompts."""
    tokens = bench.config["certificate"]["new_tokens"]
    dtype = compared_in(bench.recipe)
    return [reference.decode(graph, prompt, tokens, dtype) for prompt in bench.prompts]


def export(
    bench: Workbench,
    arm: str,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    sequences: list[Sequence],
    captured: Any,
    path: Path | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint of an arm, issues its certificate and checks it.

    Args:
        bench: The workbench.
        arm: Name of the arm.
        tensors: What its method or `convert` returned.
        folded: Likewise.
        sequences: Reference logits of its graph.
        captured: What was captured of the training graph, or why nothing was.
        path: Directory to write; None: `export/<format>` in the run.

    Returns:
        `summary["export"]`; without a format, no path, and nothing that could be verified.
    """
    name = bench.config["format"]["name"]
    if name == "none":
        return {"path": None, "verified": None, "captured": captured}
    if not tensors:
        raise ValueError(f"format={name}: nothing is quantized; train with +method@adapter.then=gptq, say, to export")
    path = path or bench.run.path / "export" / name
    recipe, tensors = FORMATS[name].expressed(bench.recipe, tensors)
    FORMATS[name].save(path, bench.model, recipe, tensors, folded, bench.tokenizer, bench.dtype)
    check_tokenizer(path, bench.tokenizer)
    write_beside(path, bench.recipe, name, linears(bench.plan, bench.config), started(bench))
    device = "cuda" if bench.device.type == "cuda" else "cpu"
    facts = {
        "arm": arm,
        "model": bench.config["model"]["name"],
        "device": bench.run.facts["device"],
        "storage_dtype": bench.config["export"]["dtype"],
        "captured": captured,
        "versions": versions(),
    }
    issue(path, tensors, unquantized_state(bench.model, tensors, folded, bench.dtype), sequences, facts)
    return outcome(str(path), verify(path, device))


def started(bench: Workbench) -> Launch:
    """How engines are started on an export of the run."""
    what, length = Path(bench.config["choices"]["recipe"]).stem, bench.model.config.max_position_embeddings
    return launch(bench.config["model"]["name"], what, bench.config["export"]["dtype"], length)


def write_card(
    bench: Workbench, summary: Mapping[str, Any], arm: str, outcome: Mapping[str, Any], argv: list[str] | None = None
) -> None:
    """Writes the model card of an export that is judged and certified.

    Args:
        bench: The workbench.
        summary: The run's.
        arm: Whose checkpoint it is.
        outcome: What `export` returned; without a path nothing is written.
        argv: The command, if it was not the run's own.
    """
    if outcome["path"] is None:
        return
    config = bench.config
    layers = linears(bench.plan, config)
    refused = served(config["format"]["name"], layers, config["export"]["dtype"], bench.recipe.kv)
    text = card(config, bench.run.facts, summary, arm, bench.recipe, outcome, refused, argv or ())
    (Path(outcome["path"]) / CARD).write_text(text, encoding="utf-8")


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Asserts that what was written is training's tokenizer: the certificate's prompts are ids, and see no text."""
    written = AutoTokenizer.from_pretrained(path)
    assert tokenizer_digest(written) == tokenizer_digest(tokenizer), f"{path}: another tokenizer was written"
    for name in ("chat_template", "eos_token_id", "bos_token_id"):
        assert getattr(written, name) == getattr(tokenizer, name), f"{path}: another {name} was written"


def outcome(path: str, certificate: dict[str, Any]) -> dict[str, Any]:
    """A certificate in the words of `summary.json`."""
    checks = certificate["checks"]
    weights = [check["passed"] for name, check in checks.items() if name in foreign.DECODERS]
    engine, files = checks.get("engine", {}), checks.get("files", {})
    return {
        "path": path,
        "verified": certificate["verified"],
        "codes_equal": checks.get("tensors", {}).get("passed"),
        "files_changed": [*files.get("changed", []), *files.get("added", [])],
        "weights_equal": all(weights) if weights else None,
        "max_abs_logit_diff": engine.get("max_abs_logit_diff"),
        "max_kl": engine.get("max_kl"),
        "greedy_equal": engine.get("greedy_equal") == engine.get("prompts") if engine else None,
        "fast_path": checks.get("fast_path"),
    }
