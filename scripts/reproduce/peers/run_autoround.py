"""auto-round, its defaults but for steps, which the command line says; on a CPU fp32 throughout, not compiled."""

import torch
from auto_round import AutoRound
from driver import arguments, save, timed
from transformers import AutoModelForCausalLM, AutoTokenizer

given = arguments(("autoround",))
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(given.model)
samples, length = given.ids.shape
amp = given.device == "cuda"
compile = None if amp else False  # None: as the tool decides
rounding = AutoRound(
    model, tokenizer, bits=given.bits, group_size=given.group_size, sym=True, iters=given.steps, nsamples=samples,
    seqlen=length, batch_size=min(given.batch_size, samples), dataset=[ids[None] for ids in given.ids], seed=0,
    device_map=given.device, enable_torch_compile=compile, amp=amp,
)  # fmt: skip
(rounded, _), took = timed(rounding.quantize)
names = {name for name, _ in model.named_parameters()}
(scale_dtype,) = {module.scale.dtype for module in rounded.modules() if getattr(module, "scale", None) is not None}
dense = {name: value for name, value in rounded.state_dict().items() if name in names}
sizes = f"iters={given.steps}, batch_size={min(given.batch_size, samples)}"
settings = f"AutoRound({sizes}, amp={amp}, enable_torch_compile={compile})"
save(given, dense, took, scale_dtype, settings, ("auto-round",))
