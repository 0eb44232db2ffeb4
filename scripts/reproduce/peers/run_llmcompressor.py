"""llm-compressor's RTN, GPTQ and AWQ, each with the tool's defaults, on symmetric groups."""

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from driver import arguments, save, timed
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

given = arguments(("rtn", "gptq", "gptq_mse", "awq"))
if given.device == "cpu":
    # Its AWQ pins memory for an accelerator, which a CPU has not: `RuntimeError: Cannot access accelerator device`.
    IntermediatesCache.pin_memory = lambda *_: None
weights = {"num_bits": given.bits, "type": "int", "symmetric": True, "strategy": "group"}
weights |= {"group_size": given.group_size}
searched = {"observer": "memoryless_mse"} if given.method == "gptq_mse" else {}
groups = {"group_0": {"targets": ["Linear"], "weights": weights | searched}}
scheme = {"config_groups": groups, "ignore": ["lm_head"]}
recipe = {
    "rtn": lambda: [QuantizationModifier(**scheme)],
    "gptq": lambda: [GPTQModifier(**scheme)],
    "gptq_mse": lambda: [GPTQModifier(**scheme)],
    "awq": lambda: [AWQModifier(), QuantizationModifier(**scheme)],
}[given.method]()

model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(given.model)
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in given.ids.tolist()]
more = {"num_calibration_samples": len(rows), "max_seq_length": given.ids.shape[1]}
_, took = timed(
    lambda: oneshot(model=model, tokenizer=tokenizer, dataset=Dataset.from_list(rows), recipe=recipe, **more)
)

dense, scales = {name: value.data for name, value in model.named_parameters()}, set()
for name, module in model.named_modules():
    args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    if args is not None:
        scale, zero = module.weight_scale, getattr(module, "weight_zero_point", None)
        dense[f"{name}.weight"] = fake_quantize(module.weight.data, scale, zero, args)
        scales.add(scale.dtype)
        for part in ("weight_scale", "weight_zero_point"):
            dense.pop(f"{name}.{part}", None)
(scale_dtype,) = scales
settings = {"rtn": "QuantizationModifier()", "gptq": "GPTQModifier(): actorder static, dampening_frac 0.01",
            "gptq_mse": "GPTQModifier(), weights' observer memoryless_mse",
            "awq": "AWQModifier(): duo_scaling, n_grid 20; QuantizationModifier()"}  # fmt: skip
save(given, dense, took, scale_dtype, settings[given.method], ("llmcompressor", "compressed-tensors"))
