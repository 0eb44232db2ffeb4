"""The arms of a comparison: each is quantized, judged and measured in the same way."""

import copy
import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor
from transformers import PreTrainedModel

from qat.cli.exporting import export, references
from qat.cli.meter import Meter
from qat.cli.workbench import Workbench
from qat.engine.loader import FORMATS, open_checkpoint
from qat.evaluation.divergence import Scores, evaluate, mean, standard_error
from qat.evaluation.reference import Sequence
from qat.formats.base import file_bytes, unquantized_state
from qat.nn.adapter import LoRA, QLoRA
from qat.nn.fake_quantize import kept
from qat.nn.kv import quantize_kv
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import is_input_scale
from qat.surgery.adapt import add_lora, merge, prepare_qlora
from qat.surgery.calibrate import calibrate
from qat.surgery.changes import Changes
from qat.surgery.convert import Folded, Tensors, apply, input_scales, quantize_inputs
from qat.surgery.prepare import prepare
from qat.surgery.start import start_from
from qat.training.certify import certify
from qat.training.fit import Training, fit, precision
from qat.training.losses import Loss
from qat.training.optim import Optim

Arm = dict[str, Any]


def full_precision_arm(bench: Workbench) -> Arm:
    """The model as it came, rounded to the storage dtype."""
    meter = Meter(bench.device)
    scores = evaluate(bench.judged, bench.windows, None, bench.config["evaluation"]["batch_size"])
    size = file_bytes(unquantized_state(bench.model, {}, {}, bench.dtype))
    bits = bench.dtype.itemsize * 8
    return judged(bench, scores, None, size, bits, bits, meter.read(), [])


def ptq_arm(bench: Workbench, name: str, method: Mapping[str, Any], fp: Arm) -> tuple[Arm, Changes]:
    """One post-training method, resumable block by block."""
    meter = Meter(bench.device)
    changes = quantize(bench, name, method)
    changes.folded.update(static_inputs(bench, changes))
    spent = meter.read()
    fallbacks = [row for row in changes.layers if row.get("fallback")]
    return _arm(bench, changes.tensors, changes.folded, fp, spent, fallbacks), changes


def quantize(bench: Workbench, name: str, method: Mapping[str, Any], model: PreTrainedModel | None = None) -> Changes:
    """What a post-training method finds; blocks that it finished before are taken from the run directory.

    Args:
        bench: The workbench.
        name: Of what it keeps there.
        method: As the config has it.
        model: What it quantizes; None: the full-precision model.
    """
    call: Callable[..., Changes] = instantiate(method, _convert_="all")
    store, progress = bench.run.path / "checkpoints" / name, _progress(name)
    model = model or bench.judged
    return call(model, bench.recipe, bench.calibration, dtype=bench.dtype, store=store, progress=progress)


def static_inputs(bench: Workbench, changes: Changes) -> Folded:
    """Static scales of inputs, calibrated on what the method's weights compute; empty where it found its own."""
    quantizes = any(rule.input is not None for rule in bench.recipe.rules.values())
    if not quantizes or any(is_input_scale(name) for name in changes.folded):
        return {}
    graph = apply(bench.judged, changes.tensors, changes.folded)
    quantize_kv(graph, bench.recipe.kv)
    quantize_inputs(graph, bench.recipe, {}, bench.build("input_observer"), bench.dtype)
    calibrate(graph, bench.calibration)
    return input_scales(graph)


def beginning(bench: Workbench) -> Changes | None:
    """Where QAT starts, as `init` says: what a method finds, or None for the original weights.

    An arm of the same settings and this share what they keep in the run directory: the second takes it from there.
    """
    method = (bench.config.get("init") or {}).get("method")
    if method is None:
        return None
    arms: Mapping[str, Any] = bench.config.get("arms") or {}
    own = f"init_{bench.config['choices']['init']}"
    return quantize(bench, next((arm for arm, settings in arms.items() if settings == method), own), method)


def qat_arm(bench: Workbench, fp: Arm, loggers: list[Any]) -> tuple[Arm, dict[str, Any], dict[str, Any]]:
    """Trains, certifies, exports and judges the reloaded file.

    Returns:
        The arm, `summary["export"]`, and what training cost.
    """
    meter = Meter(bench.device)
    tensors, folded, sequences, captured, cost = train(bench, loggers)
    spent = meter.read()
    outcome = export(bench, "qat", tensors, folded, sequences, captured)
    if outcome["path"]:
        checkpoint = open_checkpoint(Path(outcome["path"]))
        tensors, folded = dict(checkpoint.tensors), dict(checkpoint.plain)
    return _arm(bench, tensors, folded, fp, spent, []), outcome, cost


def train(
    bench: Workbench, loggers: list[Any], begun: Changes | None = None
) -> tuple[Tensors, Folded, list[Sequence], dict[str, Any], dict[str, Any]]:
    """Trains from wherever a checkpoint left off, and certifies: codes, changed tensors, reference, evidence, cost.

    Args:
        bench: The workbench.
        loggers: Beside `metrics.jsonl`.
        begun: Where training starts, if a method has found that already; None: as `init` says.
    """
    config = bench.config
    loss: Loss = bench.build("loss")
    optim: Optim = bench.build("optim")
    adapter: LoRA | QLoRA | None = bench.build("adapter") if bench.config.get("adapter") else None
    student = _student(bench, adapter, optim.train_embeddings, begun)
    training = Training(seq_len=config["data"]["seq_len"], seed=config["seed"], **config["trainer"])
    callbacks = [instantiate(node, _convert_="all") for node in config["callbacks"].values()]
    teacher, schedule = bench.judged if loss.distils else None, bench.build("schedule")
    module, cost = fit(
        student,
        teacher,
        bench.tokens,
        training,
        loss,
        schedule,
        optim,
        bench.run.path,
        bench.device,
        loggers,
        callbacks,
    )
    cost["trained_parameters"] = sum(p.numel() for p in student.parameters() if p.requires_grad)
    captured: Any
    if isinstance(adapter, QLoRA):
        tensors, folded, sequences, captured = _merged(bench, student)
    else:
        prompts = [prompt[None] for prompt in bench.prompts]
        shape = (training.batch_size, training.seq_len) if training.compile else None
        tensors, folded, captured = certify(module, prompts, precision(training.precision, bench.device), shape)
        with kept(student):
            sequences = references(bench, student.eval())
    del module, student
    gc.collect()  # Lightning's objects refer to each other: optimizer states would live on
    return tensors, folded, sequences, captured, cost


def _student(
    bench: Workbench, adapter: LoRA | QLoRA | None, train_embeddings: bool, begun: Changes | None
) -> PreTrainedModel:
    """What trains, on the device: every weight fake-quantized, or QLoRA's."""
    student = copy.deepcopy(bench.model).to(bench.device)
    if isinstance(adapter, QLoRA):
        prepare_qlora(student, bench.recipe, adapter, bench.dtype, train_embeddings)
        return student
    begun = begun or beginning(bench)
    prepare(
        student,
        bench.recipe,
        bench.build("observer"),
        bench.build("estimator"),
        bench.dtype,
        train_embeddings,
        bench.build("input_observer"),
        bench.build("input_estimator"),
    )
    if begun is not None:
        start_from(student, begun)
    if adapter is not None:
        add_lora(student, adapter)
    if begun is None or not begun.state:  # which holds the ranges of inputs, too
        calibrate(student, bench.calibration)
    return student


def _merged(bench: Workbench, student: PreTrainedModel) -> tuple[Tensors, Folded, list[Sequence], str]:
    """QLoRA's merged weights, quantized under the recipe if a method is named; with the reference of that graph."""
    changes, then = Changes(folded=merge(student, bench.dtype)), bench.config["adapter"]["then"]
    if then is not None:
        found = quantize(bench, "adapter_then", then, apply(bench.judged, {}, changes.folded))
        changes.add(found)
        for name in found.tensors:
            changes.folded.pop(f"{name}.weight", None)  # an embedding was not QLoRA's
        changes.folded.update(static_inputs(bench, changes))
    recipe = None if then is None else bench.recipe
    graph = bench.moved(apply(bench.model, changes.tensors, changes.folded, recipe=recipe))
    captured = "not applicable: QLoRA merges after training, which changes weights by a rounding"
    return changes.tensors, changes.folded, references(bench, graph), captured


def _arm(
    bench: Workbench,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    fp: Arm,
    spent: dict[str, Any],
    fallbacks: list[dict[str, Any]],
) -> Arm:
    recipe = bench.recipe if tensors else None  # merged adapters that nothing quantizes
    graph: PreTrainedModel = apply(bench.judged, dict(tensors), dict(folded), recipe=recipe)
    scores = evaluate(graph, bench.windows, bench.judged, bench.config["evaluation"]["batch_size"])
    if (name := bench.config["format"]["name"]) == "none":
        bits = sum(t.bits for t in tensors.values())
        size = file_bytes(unquantized_state(bench.model, tensors, folded, bench.dtype)) + bits // 8
    else:
        expressed, tensors = FORMATS[name].expressed(bench.recipe, tensors)
        size = file_bytes(FORMATS[name].state(bench.model, expressed, tensors, folded, bench.dtype))
        bits = sum(t.bits for t in tensors.values())
    count = sum(t.codes.numel() for t in tensors.values())
    total = sum(p.numel() for p in bench.model.parameters())
    whole = (bits + (total - count) * bench.dtype.itemsize * 8) / total
    width = bits / count if count else bench.dtype.itemsize * 8  # merged and not quantized
    return judged(bench, scores, fp, size, whole, width, spent, fallbacks)


def judged(
    bench: Workbench,
    scores: Scores,
    fp: Arm | None,
    size: int,
    bits_per_weight: float,
    bits_per_quantized_weight: float,
    spent: dict[str, Any],
    fallbacks: list[dict[str, Any]],
) -> Arm:
    """One entry of `summary["arms"]`.

    Raises:
        ValueError: The model's logits are not finite on the test windows.
    """
    nll = mean(scores.nll, scores.tokens)
    if not math.isfinite(nll):
        raise ValueError("the model's logits are not finite on the test windows; nothing can be judged")
    paired = None if fp is None else torch.tensor(fp["windows"]["nll"], dtype=torch.float64)
    return {
        "ppl": math.exp(nll),
        "nll": nll,
        "nll_se": standard_error(scores.nll, scores.tokens, paired),
        "tokens": scores.tokens * len(scores.nll),
        "kl": 0.0 if scores.kl is None else mean(scores.kl, scores.tokens),
        "top1_agree": 1.0 if scores.agree is None else mean(scores.agree, scores.tokens),
        "bits_per_weight": bits_per_weight,
        "bits_per_quantized_weight": bits_per_quantized_weight,
        "bytes": size,
        **spent,
        "seed": bench.config["seed"],
        "fallbacks": [row["name"] for row in fallbacks],
        "windows": {"nll": scores.nll.tolist(), "kl": None if scores.kl is None else scores.kl.tolist()},
    }


def _progress(name: str) -> Callable[[int, int], None]:
    def show(done: int, blocks: int) -> None:
        if done == blocks or done % max(blocks // 5, 1) == 0:
            print(f"  {name}: block {done}/{blocks}", flush=True)

    return show
