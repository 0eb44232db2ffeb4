"""A tiny export with everything that a run leaves: RTN codes, reference logits, certificate."""

from pathlib import Path

import torch
from tiny import byte_tokenizer, recipe, tiny

from qat.engine.loader import FORMATS
from qat.evaluation.precision import compared_in
from qat.evaluation.reference import decode
from qat.evaluation.verify import issue
from qat.formats.base import unquantized_state
from qat.nn.kv import quantize_kv
from qat.nn.observers.minmax import MinMax
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply

PROMPTS = ([5, 9, 200, 31], [77, 3], [1, 2, 3, 4, 5, 6, 7])


def export(
    path: Path,
    bits: int = 4,
    symmetric: bool = True,
    certified: bool = True,
    new_tokens: int = 32,
    kv: str | None = None,
    format: str = "compressed_tensors",
) -> None:
    model, rules = tiny(), recipe(bits, symmetric=symmetric, kv=kv)
    changes = rtn(model, rules, [], observer=MinMax())
    own, tensors = FORMATS[format].expressed(rules, changes.tensors)
    FORMATS[format].save(path, model, own, tensors, changes.folded, byte_tokenizer())
    if certified:
        graph = apply(model, changes.tensors, changes.folded)
        quantize_kv(graph, rules.kv)
        sequences = [decode(graph, torch.tensor(prompt), new_tokens, compared_in(rules)) for prompt in PROMPTS]
        plain = unquantized_state(model, tensors, changes.folded, torch.bfloat16)
        issue(path, tensors, plain, sequences, {"captured": "not applicable: post-training method"})
