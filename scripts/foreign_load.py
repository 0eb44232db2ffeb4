"""What plain transformers makes of an export: `python scripts/foreign_load.py DIR`. Nothing of qat is imported.

1. Loaded in fp32, its logits on the certificate's sequences are within 1e-4 of the largest reference logit.
2. Loaded as it comes (the storage dtype), every weight equals a decoding of the file's integers written here from the
   format's description: codes of b bits, little end first, in int32 words, offset by 2**(b-1); w = round(fp32(q s)).
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def decode(words: torch.Tensor, shape: list[int], bits: int, scale: torch.Tensor) -> torch.Tensor:
    """Weights `[O, I]` of packed words `[O, ceil(I * bits / 32)]` with groups along I."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")[:, : shape[1] * bits]
    codes = stream.reshape(*shape, bits).astype(np.int64) @ (1 << np.arange(bits)) - (1 << (bits - 1))
    steps = torch.from_numpy(codes).float().reshape(shape[0], scale.shape[1], -1)
    return (steps * scale.float()[..., None]).reshape(shape).to(scale.dtype)


@torch.no_grad()
def main(path: Path) -> int:
    """Exit 0 only if both hold."""
    file = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    group, *others = config["config_groups"].values()
    if others or group["format"] != "pack-quantized" or group["input_activations"]:
        raise SystemExit("decodes one scheme of packed integers without inputs; `qat verify` checks the others")
    names = [key.removesuffix(".weight_packed") for key in file if key.endswith(".weight_packed")]
    if not group["weights"]["symmetric"]:
        raise SystemExit("asymmetric: transformers decodes it only with CompressedTensorsConfig(dequantize=True)")

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model(torch.zeros(1, 1, dtype=torch.int64))  # the library decompresses on the first forward
    reference = load_file(path / "verify" / "reference.safetensors")
    worst = largest = 0.0
    for i in range(sum(key.endswith(".ids") for key in reference)):
        expected = reference[f"{i}.logits"]
        found = model(reference[f"{i}.ids"][None, :-1]).logits[0]
        worst, largest = (
            max(worst, float((found - expected).abs().nan_to_num(nan=torch.inf).max())),
            max(largest, float(expected.abs().max())),
        )
    print(f"fp32: largest logit difference {worst:.2e}, bound {1e-4 * largest:.2e}")

    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(path)
        model(torch.zeros(1, 1, dtype=torch.int64))
    difference = 0.0
    for name in names:
        parts = [file[f"{name}.{part}"] for part in ("weight_packed", "weight_shape", "weight_scale")]
        own = decode(parts[0], parts[1].tolist(), group["weights"]["num_bits"], parts[2])
        weight = model.get_submodule(name).weight
        assert weight.dtype == own.dtype, f"{name}: {weight.dtype}, expected {own.dtype}"
        difference = max(difference, float((weight.float() - own.float()).abs().nan_to_num(nan=torch.inf).max()))
    print(f"{model.dtype}: {len(names)} quantized weights, largest difference {difference}")
    return 0 if names and worst <= 1e-4 * largest and difference == 0 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="an export")
    path = parser.parse_args().dir
    if not (path / "verify" / "reference.safetensors").is_file():
        parser.error(f"{path}: no export with a certificate")
    status = main(path)
    print("failed" if status else "passed")
    sys.exit(status)
