"""A tiny export with everything that a run leaves: RTN codes, reference logits, certificate."""

from pathlib import Path

import torch
from tiny import byte_tokenizer, recipe, scattered, tiny
from transformers import PreTrainedModel

from qat.engine.loader import FORMATS
from qat.evaluation.precision import compared_in
from qat.evaluation.reference import decode
from qat.evaluation.verify import issue
from qat.formats.base import unquantized_state
from qat.nn.observers.minmax import MinMax
from qat.numerics.recipe import Recipe
from qat.ptq.rtn import rtn
from qat.surgery.calibrate import calibrate
from qat.surgery.changes import Changes
from qat.surgery.convert import apply, input_scales, quantize_inputs

PROMPTS = ([5, 9, 200, 31], [77, 3], [1, 2, 3, 4, 5, 6, 7])


def quantized(rules: Recipe, model: PreTrainedModel) -> Changes:
    """RTN codes, and the calibrated ranges of static inputs."""
    changes = rtn(model, rules, [], observer=MinMax())
    graph = apply(model, changes.tensors, changes.folded)
    quantize_inputs(graph, rules, {}, MinMax())
    calibrate(graph, [torch.tensor([prompt]) for prompt in PROMPTS])
    changes.folded.update(input_scales(graph))
    return changes


def export(
    path: Path,
    bits: int = 4,
    symmetric: bool = True,
    certified: bool = True,
    new_tokens: int = 32,
    kv: str | None = None,
    rules: Recipe | None = None,
    layers: int = 2,
    format: str = "compressed_tensors",
    scatter: bool = False,
) -> None:
    model, rules = tiny(layers), rules or recipe(bits, symmetric=symmetric, kv=kv)
    changes = quantized(rules, model)
    if scatter:
        changes.tensors = {name: scattered(tensor) for name, tensor in changes.tensors.items()}
    own, tensors = FORMATS[format].expressed(rules, changes.tensors)
    FORMATS[format].save(path, model, own, tensors, changes.folded, byte_tokenizer())
    if certified:
        graph = apply(model, changes.tensors, changes.folded, recipe=rules)
        sequences = [decode(graph, torch.tensor(prompt), new_tokens, compared_in(rules)) for prompt in PROMPTS]
        plain = unquantized_state(model, tensors, changes.folded, torch.bfloat16)
        issue(path, tensors, plain, sequences, {"captured": "not applicable: post-training method"})
