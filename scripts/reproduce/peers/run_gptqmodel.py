"""GPTQModel's GPTQ, with the tool's defaults, on symmetric groups; weights are those that it decodes, in fp16."""

import tempfile
from pathlib import Path

import torch
from driver import arguments, save, timed
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from gptqmodel_weights import decoded
from safetensors.torch import load_file

given = arguments(("gptq",))
if given.device != "cpu":
    raise SystemExit("GPTQModel is run on the CPU alone: its kernels are built for each machine")
config = GPTQConfig(bits=given.bits, group_size=given.group_size, sym=True, offload_to_disk=False)
model = GPTQModel.load(given.model, config, dtype=torch.float32, device="cpu")
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in given.ids.tolist()]
_, took = timed(lambda: model.quantize(rows, batch_size=1))
with tempfile.TemporaryDirectory() as folder:
    model.save(folder)
    stored = {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}
    weights, _ = decoded(Path(folder), torch.float16)
packed = tuple(f"{name}." for name in weights)
dense = {name: value for name, value in stored.items() if not name.startswith(packed)}
dense |= {f"{name}.weight": weight for name, weight in weights.items()}
(scale_dtype,) = {stored[f"{name}.scales"].dtype for name in weights}
settings = (
    f"GPTQConfig(): act_group_aware={config.act_group_aware}, damp_percent={config.damp_percent}, mse={config.mse}"
)
save(given, dense, took, scale_dtype, settings, ("gptqmodel",))
