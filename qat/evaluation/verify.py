"""The certificate: the integers that training computed with are those in the file, and those that the engine serves.

`verify.json` lies beside the checkpoint. Export writes what was true before the file existed: digests of every tensor,
taken where the codes were found, and reference logits of the graph that found them. `verify` reads the file back and
holds it to that; it never evaluates a scale or a code.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.llm import LLM
from qat.engine.loader import open_checkpoint
from qat.evaluation import foreign, reference
from qat.evaluation.precision import compared_in
from qat.evaluation.reference import Sequence, difference
from qat.formats.base import (
    CERTIFICATE,
    Checkpoint,
    certified_parts,
    digest,
    quantized_digests,
    read_json,
)
from qat.numerics.metrics import kl
from qat.numerics.qtensor import QuantizedTensor

FAST_KL_BOUND = 0.02  # nats, of the fast path against the reference
MIN_PROMPTS, MIN_TOKENS = 3, 32
LATER = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", ".gitattributes", ".gitignore")  # no loader reads them
HIDDEN = (".cache/", ".git/")


def issue(
    path: Path,
    tensors: Mapping[str, QuantizedTensor],
    unquantized: Mapping[str, Tensor],
    sequences: list[Sequence],
    facts: dict[str, Any],
) -> None:
    """Writes a certificate that claims nothing yet, beside an export.

    Args:
        path: The checkpoint directory.
        tensors: What `convert` or a PTQ method returned, not what a file says.
        unquantized: Every other tensor of the file, as it was before the file.
        sequences: Reference logits of the graph that was trained or calibrated.
        facts: What is recorded beside: arm, device, captured weights, versions.
    """
    sha: dict[str, str] = {}
    for name, tensor in tensors.items():
        sha |= quantized_digests(name, tensor)
    sha |= {name: digest(value) for name, value in unquantized.items()}
    reference.save(path, sequences)
    claims = {"reference": reference_digests(sequences), "files": _file_digests(open_checkpoint(path)), "sha256": sha}
    _write(path, {"verified": False, **facts, **claims, "checks": {}})


def verify(path: Path, device: str = "auto") -> dict[str, Any]:
    """Checks an export against its certificate, writes the result into it, and returns it.

    Returns:
        The certificate: `verified` is true if every check that applies passed; `checks` has each with what was found,
        and `fast_path` beside them, which is held to a bound of its own and proves nothing; `unchecked` says what could
        not be checked here and why.

    Raises:
        ValueError: The checkpoint cannot be read at all, or a tensor is not what the certificate says; names it.
    """
    certificate = read_json(path / CERTIFICATE) if (path / CERTIFICATE).exists() else {}
    found: dict[str, Any] = {"verified": False}  # if the check does not come to its end
    try:
        found = _check(path, certificate, device)
    finally:
        if certificate and os.access(path, os.W_OK):  # a directory may be read-only
            _write(path, certificate | found)
    return certificate | found


def _check(path: Path, certificate: dict[str, Any], device: str) -> dict[str, Any]:
    opened = open_checkpoint(path)
    if not opened.tensors:
        raise ValueError(f"{path}: nothing in it is quantized, so there is nothing to verify")
    # Reading a tensor compares its digest. Each is read once, for all that other loaders are held to.
    checkpoint = replace(opened, tensors=dict(opened.tensors), plain=dict(opened.plain))
    sequences = reference.load(path)
    unchecked: list[str] = []
    checks: dict[str, Any] = {}
    if "sha256" in certificate:
        checks["tensors"] = _tensors(checkpoint, certificate["sha256"])
        checks["files"] = _files(checkpoint, certificate.get("files"))
    else:
        unchecked.append("tensors: no certificate lies beside the checkpoint, so nothing says what they should be")
    if not sequences:
        unchecked.append("logits and greedy tokens: no reference lies beside the checkpoint")
    elif reference_digests(sequences) != certificate.get("reference"):
        raise ValueError(f"{path / reference.FILE}: not the reference that {CERTIFICATE} certifies; it was changed")
    captured = certificate.get("captured")
    if isinstance(captured, dict):
        equal, modules = captured.get("equal"), captured.get("modules")
        all_of_them = isinstance(equal, int) and len(checkpoint.tensors) <= equal == modules
        checks["captured"] = {**captured, "passed": all_of_them}
    elif "sha256" in certificate and not (isinstance(captured, str) and captured):
        checks["captured"] = {"reason": "the certificate does not say what was captured", "passed": False}
    elif captured is None:
        unchecked.append("weights of the training graph: only the run that trained them could capture them")
    if certificate.get("converted_from", {}).get("certificate", "") is None:
        unchecked.append("origin: the checkpoint that this was converted from had no certificate")
    decoded, undecoded = foreign.decoders(checkpoint, sequences)
    checks |= _judged(decoded)
    unchecked += undecoded
    if sequences:
        checks["engine"] = _engine(path, sequences, device, compared_in(checkpoint.recipe))
        checks["fast_path"] = _fast_path(path, sequences, device)
    proof = {name: check for name, check in checks.items() if name != "fast_path"}  # that one is a measurement
    verified = bool(sequences) and "tensors" in proof and all(check["passed"] for check in proof.values())
    return {"checks": checks, "unchecked": unchecked, "verified": verified}


def _tensors(checkpoint: Checkpoint, sha: Mapping[str, str]) -> dict[str, Any]:
    """All have been read, so they are what the certificate says; what remains is that none is missing or beside it."""
    found = {part for name, tensor in checkpoint.tensors.items() for part in certified_parts(name, tensor)}
    found |= set(checkpoint.plain)
    missing, extra = sorted(set(sha) - found), sorted(found - set(sha))
    return {"equal": len(found) - len(extra), "missing": missing, "extra": extra, "passed": not missing and not extra}


def _judged(rows: dict[str, Any]) -> dict[str, Any]:
    """Foreign loaders, each with whether it passed: the same weights to the last bit, logits within the bound."""
    for row in rows.values():
        row["passed"] = row["max_abs_diff"] == 0
        if "max_abs_logit_diff" in row:
            row["passed"] &= reference.close(row)
    return rows


def _engine(path: Path, sequences: list[Sequence], device: str, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    llm = LLM(path, EngineConfig(kernel="reference", device=device, dtype=name))
    compared = reference.compared(_scores(llm, sequences), sequences)
    lengths = [len(s.generated) for s in sequences]
    params = SamplingParams(max_tokens=max(lengths), temperature=0.0, ignore_eos=True)
    outputs = llm.generate([s.ids[: s.prompt].tolist() for s in sequences], params)
    equal = sum(o.token_ids[: len(s.generated)] == s.generated for o, s in zip(outputs, sequences, strict=True))
    llm.check_integrity()
    enough = len(sequences) >= MIN_PROMPTS and min(lengths) >= MIN_TOKENS
    return {
        "dtype": name,
        "kv": llm.loaded.kv,
        **compared,
        "greedy_equal": equal,
        "prompts": len(sequences),
        "tokens": min(lengths),
        "passed": reference.close(compared) and equal == len(sequences) and enough,
    }


def _fast_path(path: Path, sequences: list[Sequence], device: str) -> dict[str, Any]:
    """The engine as it serves: KL and top-1 agreement with the reference, and whether each flip was a near tie."""
    llm = LLM(path, EngineConfig(device=device))
    divergence, agree, count, flips, worst, noise = 0.0, 0, 0, [], 0.0, 0.0
    for i, (sequence, scores) in enumerate(zip(sequences, _scores(llm, sequences), strict=True)):
        worst = max(worst, difference(scores, sequence.logits))
        divergence += float(kl(sequence.logits, scores).double().sum())
        same = scores.argmax(-1) == sequence.logits.argmax(-1)
        agree, count = agree + int(same.sum()), count + len(same)
        if same.any():  # of the others, because a flip's own margin is below twice its own difference, always
            noise = max(noise, difference(scores[same], sequence.logits[same]))
        for position in (~same).nonzero().flatten().tolist():
            top = sequence.logits[position].topk(2).values
            flips.append({"prompt": i, "position": position, "margin": float(top[0] - top[1])})
    mean = divergence / count
    near = all(flip["margin"] <= 2 * noise for flip in flips)
    return {
        "kernels": llm.kernels,
        "kl": mean,
        "top1_agree": agree / count,
        "max_abs_logit_diff": worst,
        "noise": noise,
        "flips": flips,
        "bound": FAST_KL_BOUND,
        "passed": mean <= FAST_KL_BOUND and near,
    }


def _scores(llm: LLM, sequences: list[Sequence]) -> list[Tensor]:
    """Logits of the reference's tokens through the cache: prompts as prompts, the rest as when decoding."""
    return llm.score([s.ids[:-1].tolist() for s in sequences], [s.prompt for s in sequences])


def _file_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every file, in folders too, but those whose tensors are certified one by one, and the certificate.

    Config, generation config, tokenizer, templates. A link that leads to no file counts as an empty one.
    """
    path = checkpoint.path
    tensors = {file for file in checkpoint.files.values() if file.suffix == ".safetensors"}  # GGUF's say more than that
    elsewhere = {*tensors, path / CERTIFICATE, path / reference.FILE}
    files = (p for p in sorted(path.rglob("*")) if (p.is_file() or p.is_symlink()) and p not in elsewhere)
    content = ((p, p.read_bytes() if p.is_file() else b"") for p in files)
    return {p.relative_to(path).as_posix(): hashlib.sha256(data).hexdigest() for p, data in content}


def _files(checkpoint: Checkpoint, sha: Any) -> dict[str, Any]:
    """Whether those files still are what they were, and none came later.

    But a card, a license, and what hubs and git keep in hidden folders: no loader reads them.
    """
    sha = sha if isinstance(sha, dict) else {}
    now = _file_digests(checkpoint)
    changed = sorted(name for name, value in sha.items() if now.get(name) != value)
    added = sorted(name for name in now if name not in sha and name not in LATER and not name.startswith(HIDDEN))
    passed = bool(sha) and not changed and not added
    return {"equal": len(sha) - len(changed), "changed": changed, "added": added, "passed": passed}


def reference_digests(sequences: list[Sequence]) -> list[dict[str, str]]:
    """What a certificate has of its reference logits."""
    return [{"ids": digest(s.ids), "logits": digest(s.logits), "prompt": str(s.prompt)} for s in sequences]


def _write(path: Path, certificate: dict[str, Any]) -> None:
    part = path / f".{CERTIFICATE}.part"
    part.write_text(json.dumps(certificate, indent=1), encoding="utf-8")
    os.replace(part, path / CERTIFICATE)
