"""A checkpoint of one format becomes one of another: the same integers, the same scales, so the same weights."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.cli.beside import CARD, launch, write_beside
from qat.cli.exporting import check_tokenizer, outcome
from qat.cli.rundir import versions
from qat.cli.serving import check, served
from qat.engine.loader import FORMATS, open_checkpoint
from qat.evaluation import reference
from qat.evaluation.verify import issue, reference_digests, verify
from qat.formats.base import CERTIFICATE, Checkpoint, certified_parts, read_json, unquantized_state
from qat.formats.targets import Layer
from qat.models.hf import skeleton
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.report.card import converted_card

KEPT = ("arm", "model", "device", "storage_dtype", "captured")  # what a certificate says of where codes are from
UNKNOWN = "unknown: the checkpoint that this was converted from has no certificate"


def convert(source: Path, name: str, path: Path, device: str, target: str | None = None) -> dict[str, Any]:
    """Writes a checkpoint in another format, with the certificate that the old one's reference logits allow.

    Args:
        source: A checkpoint directory in one of our formats.
        name: The format to write.
        path: Directory to write.
        device: Where the engine verifies.
        target: Who is to load it, as `export.target`; None: nobody is asked.

    Returns:
        The new certificate, verified as every export is. Without a certificate beside the source there are no reference
        logits, and it cannot be.

    Raises:
        ValueError: The source is damaged, the format cannot say it without a loss, or the target cannot load it; names
            the module.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.tensors:
        raise ValueError(f"from={source}: nothing in it is quantized")
    if path.resolve() == source.resolve():
        raise ValueError(f"out={path}: the checkpoint that is read; name another directory")
    certificate = read_json(source / CERTIFICATE) if (source / CERTIFICATE).exists() else {}
    sequences = reference.load(source)
    if sequences and reference_digests(sequences) != certificate.get("reference"):
        raise ValueError(f"{source / reference.FILE}: not the reference that {CERTIFICATE} certifies; it was changed")
    tensors, plain = dict(checkpoint.tensors), dict(checkpoint.plain)
    _check_whole(checkpoint, tensors, certificate)
    model, tokenizer = skeleton(source)
    dtype = model.config.dtype
    if lost := sorted(
        set(model.state_dict())
        - set(plain)
        - {f"{module}.weight" for module in tensors}
        - set(getattr(model, "all_tied_weights_keys", None) or {})
    ):
        raise ValueError(f"{source}: tensor {lost[0]} is missing")
    for module, tensor in tensors.items():
        hit, kind = checkpoint.recipe.rule_for(module), type(model.get_submodule(module)).__name__
        FORMATS[name].check_scheme(module, tensor.scheme, hit and hit[1].input, kind)
    layers, stored = linears(model, checkpoint.recipe, tensors), str(dtype).removeprefix("torch.")
    check({"export": {"target": target, "dtype": stored}, "format": {"name": name}}, layers, checkpoint.recipe.kv)
    recipe, expected = FORMATS[name].expressed(checkpoint.recipe, tensors)
    FORMATS[name].save(path, model, recipe, expected, plain, tokenizer, dtype)
    check_tokenizer(path, tokenizer)
    check_lossless(path, tensors, expected)
    known = launch(certificate.get("model", source.name), name, stored, model.config.max_position_embeddings)
    write_beside(path, checkpoint.recipe, name, layers, known)
    facts = {key: certificate[key] for key in KEPT if key in certificate} if certificate else {"captured": UNKNOWN}
    sha = hashlib.sha256((source / CERTIFICATE).read_bytes()).hexdigest() if certificate else None
    origin = {"format": checkpoint.config["quantization_config"]["quant_method"], "certificate": sha}
    facts |= {"converted_from": origin, "versions": versions()}
    issue(path, expected, unquantized_state(model, expected, plain, dtype), sequences, facts)
    verified = verify(path, device)
    refused = served(name, layers, stored, checkpoint.recipe.kv)
    text = converted_card(verified, sys.argv, checkpoint.recipe, name, outcome(str(path), verified), refused)
    (path / CARD).write_text(text, encoding="utf-8")
    return verified


def linears(model: nn.Module, recipe: Recipe, tensors: Mapping[str, QuantizedTensor]) -> list[Layer]:
    """The linears of a checkpoint, as those who load it see them."""
    found = []
    for module, one in model.named_modules():
        if isinstance(one, nn.Linear):
            tensor, shape = tensors.get(module), (one.out_features, one.in_features)
            hit = recipe.rule_for(module) if tensor is not None else None
            weight, g_idx = (None, None) if tensor is None else (tensor.scheme, tensor.g_idx)
            found.append(Layer(module, shape, weight, hit and hit[1].input, g_idx is not None))
    return found


def _check_whole(checkpoint: Checkpoint, tensors: Mapping[str, QuantizedTensor], certificate: dict[str, Any]) -> None:
    """Raises ValueError if the source lacks a tensor of which its certificate speaks; reading held the others to it."""
    found = {part for name, tensor in tensors.items() for part in certified_parts(name, tensor)} | set(checkpoint.plain)
    if lost := sorted(set(certificate.get("sha256", found)) - found):
        raise ValueError(f"{checkpoint.path}: {lost[0]} is missing, of which {CERTIFICATE} speaks")


def check_lossless(path: Path, tensors: Mapping[str, QuantizedTensor], expected: Mapping[str, QuantizedTensor]) -> None:
    """Reads a written file back, and compares it with what it was made from.

    Args:
        path: The new checkpoint.
        tensors: The old one's tensors.
        expected: The same in the new format's words: codes, scales and zero points that it must hold bit for bit.

    Raises:
        ValueError: A part, or the weight that it decodes to, is another; names the first.
    """
    written = open_checkpoint(path).tensors
    for name, tensor in tensors.items():
        if name not in written:
            raise ValueError(f"{path}: {name} was not written as a quantized module")
        found, parts = written[name], certified_parts(name, expected[name])
        own = certified_parts(name, found)
        for key in sorted(parts.keys() | own.keys()):
            if key not in parts or key not in own or not _same(parts[key], own[key]):
                raise ValueError(f"{path}: {key} does not survive the conversion bit for bit")
        if not _same(found.dequantize(torch.float32), tensor.dequantize(torch.float32)):
            raise ValueError(f"{path}: {name} decodes to another weight than before")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
