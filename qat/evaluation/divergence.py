"""How far a model is from the full-precision one, on held-out windows."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.numerics.metrics import kl, nll, top1_agree


@dataclass(frozen=True)
class Scores:
    """What one model did on every window; sums over a window's tokens, in float64.

    Attributes:
        tokens: Predicted tokens in a window: its length less one.
        nll: Negative log-likelihood, nats, `[windows]`.
        kl: KL(full precision || model) at T = 1, nats, `[windows]`; None for the full-precision model itself.
        agree: Tokens on which both rank the same token first, `[windows]`; None likewise.
    """

    tokens: int
    nll: Tensor
    kl: Tensor | None
    agree: Tensor | None


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, windows: Tensor, reference: PreTrainedModel | None = None, batch_size: int = 1
) -> Scores:
    """Runs a model, and beside it the full-precision one, over windows of token ids.

    Args:
        model: Judged as it stands, in the dtype that it has; put into eval mode.
        windows: int64 `[n, seq_len]`; no window sees another.
        reference: The full-precision model, or None.
        batch_size: Windows at once.
    """
    device = next(model.parameters()).device
    rows = []
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        logits = model.eval()(input_ids=batch, use_cache=False).logits
        other = None if reference is None else reference.eval()(input_ids=batch, use_cache=False).logits
        for i, ids in enumerate(batch):  # window by window: never a second copy of all logits
            own, targets = logits[i, :-1], ids[1:]
            row = [nll(own, targets).double().sum()]
            if other is not None:
                row += [kl(other[i, :-1], own).double().sum(), top1_agree(other[i, :-1], own).double().sum()]
            rows.append(torch.stack(row).cpu())
    table = torch.stack(rows)
    tokens = windows.shape[1] - 1
    if reference is None:
        return Scores(tokens, table[:, 0], None, None)
    return Scores(tokens, table[:, 0], table[:, 1], table[:, 2])


def mean(values: Tensor, tokens: int) -> float:
    """Mean per token of sums per window."""
    return float(values.sum() / (len(values) * tokens))


def standard_error(values: Tensor, tokens: int, paired: Tensor | None = None) -> float:
    """Standard error of the mean per token over windows; of the difference to `paired` where that is given."""
    per_token = (values if paired is None else values - paired) / tokens
    return float(per_token.std(correction=1) / len(per_token) ** 0.5) if len(per_token) > 1 else 0.0


def all_finite(parts: Iterable[Tensor | None]) -> bool:
    """Whether every given tensor holds finite numbers only."""
    return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)
