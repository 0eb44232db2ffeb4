"""The head and the loss by chunks of tokens: memory does not grow with batch x sequence x vocabulary.

A chunk's gradient is taken as soon as its loss is known, with respect to its hidden states and to the head's
parameters, and only these are kept until backward. So the head runs once for every token, as it would without chunks,
and nothing is recomputed. (`torch.utils.checkpoint` would run both models' heads twice.) What a head does with its
weight, such as fake-quantizing it, it does for every chunk; an observer of its inputs sees chunks, not batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.divergences import NO_TARGET
from qat.training.divergences import per_token
from qat.training.losses import Loss
from qat.training.split import SplitModel

# Logits of one model at once, at most; three such tensors exist together: student, teacher, gradient, and one more for
# each further part of the loss. On a CPU: 1365 tokens of the demo model (vocabulary 49152), 128 MiB in bf16 each; 2048
# tokens take as long with 2**22 as with 2**28, so memory decides. Elsewhere a chunk costs some thirty launches and one
# more sum of the gradients of a trained head, and matrix products want many rows: 5461 tokens, 512 MiB each, 1.5 GiB
# in all, of the 80 that an H100 has.
LOGITS_CPU, LOGITS = 2**26, 2**28

Measure = Callable[[slice, Tensor], Tensor]  # a chunk and its hidden states [n, H] -> its share of the means [parts]


def chunked_loss(
    loss: Loss, student: SplitModel, hidden: Tensor, teacher: SplitModel | None, taught: Tensor | None, ids: Tensor
) -> dict[str, Tensor]:
    """The loss and its unweighted parts, each the mean over its tokens, fp32 scalars: `{"loss", "kl", ...}`.

    Divergences count every token, cross-entropy those with a successor. Only `"loss"` has a gradient.

    Args:
        loss: What to minimise.
        student: Its head is run here.
        hidden: The student decoder's output `[B, T, H]`.
        teacher: Its head is run here, without a gradient; needed where the loss distils.
        taught: The teacher decoder's output `[B, T, H']`; needed likewise.
        ids: Token ids `[B, T]`.
    """
    targets = ids.roll(-1, 1)
    targets[:, -1] = NO_TARGET
    targets, predicted = targets.flatten(), ids[:, 1:].numel()
    given = None if taught is None else taught.flatten(0, 1)

    def measure(chunk: slice, part: Tensor) -> Tensor:
        other = None
        if teacher is not None and given is not None:
            with torch.no_grad():
                other = teacher.logits(given[None, chunk]).squeeze(0)
        logits = student.logits(part[None]).squeeze(0)  # the gradient of [0] would be copied into zeros
        found = per_token(loss, logits, other, targets[chunk])
        return torch.stack([found[n].sum() / (predicted if n == "ce" else ids.numel()) for n in loss.weights])

    flat = hidden.flatten(0, 1)
    chunks = _chunks(len(flat), (LOGITS_CPU if flat.device.type == "cpu" else LOGITS) // student.vocabulary)
    weights, leaves = list(loss.weights.values()), student.head_parameters
    if torch.is_grad_enabled():
        total, means = _Chunked.apply(measure, weights, chunks, leaves, flat, *leaves)
    else:
        means = torch.stack([measure(chunk, flat[chunk]) for chunk in chunks]).sum(0)
        total = _total(weights, means)
    return {"loss": total, **dict(zip(loss.weights, means.unbind(), strict=True))}


def _chunks(tokens: int, most: int) -> list[slice]:
    """As few as there can be of `most` tokens, all of one size but the last: 8192 in two are 4096 and 4096."""
    size = -(-tokens // -(-tokens // max(1, most)))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _total(weights: list[float], means: Tensor) -> Tensor:
    return torch.stack([weight * mean for weight, mean in zip(weights, means.unbind(), strict=True)]).sum()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        measure: Measure,
        weights: list[float],
        chunks: list[slice],
        leaves: list[nn.Parameter],  # the same tensors as `parameters`, which autograd sees
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inward = torch.empty_like(hidden) if ctx.needs_input_grad[4] else None
        sums: list[Tensor | None] = [None] * len(leaves)
        shares = []
        for chunk in chunks:
            part = hidden[chunk].detach().requires_grad_(inward is not None)
            with torch.enable_grad():
                share = measure(chunk, part)
                value = _total(weights, share)
            shares.append(share.detach())
            wanted = [*leaves, part] if inward is not None else leaves
            grads = torch.autograd.grad(value, wanted, allow_unused=True) if wanted else ()
            if inward is not None:
                inward[chunk] = grads[-1]
            for i, (before, grad) in enumerate(zip(sums, grads, strict=False)):
                sums[i] = grad if before is None else before if grad is None else before + grad  # not in place: aliases
        means = torch.stack(shares).sum(0)
        ctx.save_for_backward(inward, *sums)
        ctx.mark_non_differentiable(means)
        return _total(weights, means), means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else saved * grads[0] for saved in ctx.saved_tensors]
        return None, None, None, None, *scaled
