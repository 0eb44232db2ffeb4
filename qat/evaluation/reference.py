"""Reference logits: what the trained or calibrated graph says, on fixed prompts and their greedy ends."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from qat.evaluation.precision import computing

LOGIT_BOUND = 1e-4  # of the largest reference logit
KL_BOUND = 1e-5  # nats, at each token: one logit may be so large that the other bound says nothing of the rest
FILE = "verify/reference.safetensors"  # in a folder of its own: serving tools read every safetensors file of theirs


@dataclass(frozen=True)
class Sequence:
    """One prompt, and what greedy decoding made of it.

    Attributes:
        ids: Prompt and generated tokens, int64 `[T]`.
        prompt: Length of the prompt.
        logits: fp32 `[T - 1, V]`: row t precedes token t + 1.
    """

    ids: Tensor
    prompt: int
    logits: Tensor

    @property
    def generated(self) -> list[int]:
        """The generated tokens."""
        return self.ids[self.prompt :].tolist()


@torch.no_grad()
def decode(graph: PreTrainedModel, prompt: Tensor, new_tokens: int, dtype: torch.dtype = torch.float32) -> Sequence:
    """Greedy decoding with a KV cache, keeping the logits of every position; eos does not stop it.

    Args:
        graph: Any causal language model, with fp32 parameters.
        prompt: Token ids `[T]`.
        new_tokens: How many to append.
        dtype: What it computes in, fp32 or fp64: see `precision.compared_in`.
    """
    device = next(graph.parameters()).device
    ids, logits = prompt.tolist(), []
    with computing(dtype):
        out = graph(input_ids=prompt[None].to(device), use_cache=True)
        logits.append(out.logits[0].cpu())
        for _ in range(new_tokens):
            ids.append(int(logits[-1][-1].argmax()))
            if len(ids) == len(prompt) + new_tokens:
                break
            step = torch.tensor([[ids[-1]]], device=device)
            out = graph(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0].cpu())
    assert all(part.dtype == dtype for part in logits), f"logits in {logits[0].dtype}, asked for in {dtype}"
    return Sequence(torch.tensor(ids), len(prompt), torch.cat(logits).float())


def save(path: Path, sequences: list[Sequence]) -> None:
    """Writes the sequences into an export directory."""
    (path / FILE).parent.mkdir(exist_ok=True)
    parts: dict[str, Tensor] = {}
    for i, sequence in enumerate(sequences):
        length = torch.tensor(sequence.prompt)
        parts |= {f"{i}.ids": sequence.ids, f"{i}.prompt": length, f"{i}.logits": sequence.logits}
    save_file(parts, path / FILE)
    (path / FILE).chmod((path / FILE).parent.stat().st_mode & 0o666)  # safetensors lets only the owner read


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors; infinite where it is not a number, so that NaN is never close to anything."""
    return float((found - expected).abs().nan_to_num(nan=torch.inf).max())


def compared(found: Iterable[Tensor], sequences: list[Sequence]) -> dict[str, Any]:
    """Logits beside the reference's: the largest difference, the largest reference logit, the largest KL of a token."""
    worst = largest = divergence = 0.0
    for scores, sequence in zip(found, sequences, strict=True):
        worst = max(worst, difference(scores, sequence.logits))
        largest = max(largest, difference(sequence.logits, torch.zeros(())))
        p, q = (logits.double().log_softmax(-1) for logits in (sequence.logits, scores))
        divergence = max(divergence, difference((p.exp() * (p - q)).sum(-1), torch.zeros(())))
    return {"max_abs_logit_diff": worst, "max_abs_logit": largest, "max_kl": divergence}


def close(row: dict[str, Any]) -> bool:
    """Whether what `compared` found is within both bounds; nothing is close to a reference that is not finite."""
    worst, largest, divergence = (row[key] for key in ("max_abs_logit_diff", "max_abs_logit", "max_kl"))
    return math.isfinite(largest) and worst <= LOGIT_BOUND * largest and divergence <= KL_BOUND


def load(path: Path) -> list[Sequence]:
    """Reads the sequences of an export directory; none if it has none.

    Raises:
        ValueError: The file is damaged.
    """
    if not (path / FILE).exists():
        return []
    try:
        parts = load_file(path / FILE)
        count = len(parts) // 3
        return [Sequence(parts[f"{i}.ids"], int(parts[f"{i}.prompt"]), parts[f"{i}.logits"]) for i in range(count)]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path / FILE}: damaged ({error})") from None
