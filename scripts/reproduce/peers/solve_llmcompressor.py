"""llm-compressor's GPTQ solver on weights and Hessians that `scripts/solvers.py` hands over.

    python solve_llmcompressor.py IN.safetensors OUT.safetensors

IN has `<problem>.weight` and `<problem>.hessian` (fp32) of problems, and in its metadata `cases`: a list of `name`,
`problem`, `bits`, `group_size` (null: a scale for each row), `order` (none or static), `damping` and `block_size`. OUT
gets `<name>.codes` and `<name>.scale`, and of every problem and order the factor of the inverse Hessian that it uses.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import apply_activation_ordering, factorize_hessian
from llmcompressor.observers import Observer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def arguments(case: dict[str, Any]) -> QuantizationArgs:
    """A case in its words."""
    size = case["group_size"]
    how = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    order = None if case["order"] == "none" else case["order"]
    return QuantizationArgs(num_bits=case["bits"], type="int", symmetric=True, actorder=order, **how)


@torch.no_grad()
def solve(weight: Tensor, hessian: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """Codes, scale and factor, as its GPTQModifier finds them with its min-max observer; scales in fp32."""
    args = arguments(case)
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
    found = observer(weight).get_qparams()
    scale, zero, copies = found["scale"], found["zero_point"], (weight.clone()[None], hessian.clone()[None])
    quantized, _, fallback = quantize_weight(
        *copies, scale[None], zero[None], None, args, blocksize=case["block_size"], percdamp=case["damping"]
    )
    if bool(fallback.any()):
        raise ValueError(f"{case['name']}: it rounded to nearest")
    codes = (quantized[0].reshape(*scale.shape, -1) / scale[..., None]).round().reshape(weight.shape)
    ordered = apply_activation_ordering(weight.clone()[None], hessian.clone()[None], args.actorder)[:2]
    factor = factorize_hessian(*ordered, case["damping"], torch.zeros(1, dtype=torch.bool))[0]
    return {"codes": codes.to(torch.int8), "scale": scale, "factor": factor.triu()}


def main() -> None:
    """Solves every case; prints what solved it."""
    source, target = sys.argv[1:]
    with safe_open(source, framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
        given = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    found = {}
    for case in cases:
        solved = solve(given[f"{case['problem']}.weight"], given[f"{case['problem']}.hessian"], case)
        factor = solved.pop("factor")
        found |= {f"{case['name']}.{key}": value.contiguous() for key, value in solved.items()}
        found[f"{case['problem']} {case['order']}.factor"] = factor.contiguous()
    save_file(found, target, {"by": f"llmcompressor {version('llmcompressor')}"})


if __name__ == "__main__":
    main()
