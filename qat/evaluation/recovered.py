"""How much of a PTQ method's loss QAT won back."""

from typing import Any

import torch

from qat.evaluation.divergence import standard_error

SIGNIFICANT = 3.0  # standard errors that a denominator must have


def recovered(
    arms: dict[str, dict[str, Any]], candidates: list[str], trained: str = "qat", reference: str = "fp"
) -> dict[str, Any]:
    """Recovered fractions of a trained arm against every PTQ arm, and against the best of them.

        kl = 1 - kl_trained / kl_ptq
        nll = (nll_ptq - nll_trained) / (nll_ptq - nll_reference)

    Args:
        arms: `summary["arms"]`, each with per-window sums under `windows`.
        candidates: The PTQ arms among them.
        trained: The arm that is judged.
        reference: What it is judged against: `fp` for distilled arms, the fine-tuned model for cross-entropy ones.

    Returns:
        `{"vs_<ptq>": {"kl", "nll"}, ..., "vs_best_ptq": {"kl": {"value", "winner"}, "nll": ..., "candidates"}}`; nll is
        None where the PTQ method lost less than three paired standard errors, so that the quotient would be noise, or
        where a single window has none.
    """
    found: dict[str, Any] = {}
    for name in candidates:
        ptq, own, full = arms[name], arms[trained], arms[reference]
        windows = [torch.tensor(a["windows"]["nll"], dtype=torch.float64) for a in (ptq, full)]
        noise = standard_error(windows[0], ptq["tokens"] // len(windows[0]), windows[1])
        lost = ptq["nll"] - full["nll"]
        known = len(windows[0]) > 1  # a single window has no standard error
        nll = (ptq["nll"] - own["nll"]) / lost if known and lost > SIGNIFICANT * noise else None
        found[f"vs_{name}"] = {"kl": 1 - own["kl"] / ptq["kl"] if ptq["kl"] > 0 else None, "nll": nll}
    if candidates:
        best = {metric: min(candidates, key=lambda n: arms[n][metric]) for metric in ("kl", "nll")}
        found["vs_best_ptq"] = {
            metric: {"value": found[f"vs_{winner}"][metric], "winner": winner} for metric, winner in best.items()
        } | {"candidates": candidates}
    return found
