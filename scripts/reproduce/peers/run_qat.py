"""Ours, with the settings of `configs/method` as they are where a GPU is used, and the recipe `configs/recipe` has.

`gptq_paper` is `gptq` on min-max ranges and without GPTAQ: what other tools' defaults are nearest to. Methods in `_ct`
have scales as compressed-tensors has them, without signs, so that what is left of a difference is the method's;
`gptq_group_ct` takes groups by their energy, and their ranges from the weights at hand. In groups of 64. On a GPU the
model is in bf16 and eight sequences at a time are heard, as with `qat run`.
"""

from typing import Any

import torch
from driver import arguments, save, timed
from hydra.utils import instantiate

from qat.cli.devices import by_device
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS
from qat.cli.workbench import cast
from qat.models import hf
from qat.surgery.convert import apply

PAPER = ["method.asymmetry=0", "observer=minmax", "method.observer=${observer}"]
UNSIGNED = "recipe.rules.linears.weight.convention=ct"
VARIANTS = {"gptq_paper": PAPER, "gptq_paper_ct": [*PAPER, UNSIGNED]}
VARIANTS |= {f"{method}_ct": [UNSIGNED] for method in ("rtn", "gptq", "awq")}
VARIANTS |= {"gptq_group_ct": ["method.act_order=group", "method.groups=current", UNSIGNED]}
METHODS = ("rtn", "mse_rtn", "gptq", "awq", "autoround", *VARIANTS)


def overrides(method: str, bits: int, steps: int, batch_size: int, samples: int) -> list[str]:
    """A method as overrides of `qat ptq`.

    Raises:
        ValueError: AutoRound's steps are no whole passes over the calibration samples.
    """
    named = method.partition("_")[0] if method in VARIANTS else method
    found = [f"method={named}", f"recipe=w{bits}a16_g64", *VARIANTS.get(method, [])]
    if method == "autoround":
        if steps * batch_size % samples:
            raise ValueError(f"--steps {steps} of {batch_size} sequences are no whole passes over {samples} samples")
        found += [f"method.epochs={steps * batch_size // samples}", f"method.batch_size={batch_size}", "seed=0"]
    return found


def composed(own: list[str]) -> dict[str, Any]:
    """The config that overrides give, with the settings for GPUs.

    Raises:
        ValueError: One does not fit.
    """
    config, problems = validate(VERBS["ptq"], ["format=none", "logger=none", *own], Tree.of([]))
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return by_device(config, "cuda")


def main() -> None:
    """Quantizes and saves."""
    given = arguments(METHODS)
    assert given.group_size == 64
    samples = len(given.ids)
    own = overrides(given.method, given.bits, given.steps, min(given.batch_size, samples), samples)
    config = composed([*own, f"model.path={given.model}"])
    recipe, method = (instantiate(config[key], _convert_="all") for key in ("recipe", "method"))
    model, _ = hf.load(given.model, given.model)
    model, size = model.to(given.device), 8 if given.device == "cuda" else 1
    seen = cast(apply(model, {}, {}), torch.bfloat16) if given.device == "cuda" else model
    changes, took = timed(lambda: method(seen, recipe, list(given.ids.split(size)), dtype=torch.bfloat16))
    graph = apply(model, changes.tensors, changes.folded, recipe=recipe)
    (scale_dtype,) = {tensor.scale.dtype for tensor in changes.tensors.values()}
    save(given, dict(graph.named_parameters()), took, scale_dtype, " ".join(own), ())


if __name__ == "__main__":
    main()
