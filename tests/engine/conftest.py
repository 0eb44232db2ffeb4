"""Tiny random checkpoints of every family, plain and packed, and what Hugging Face makes of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qat.evaluation.reference import Sequence
from qat.formats import compressed_tensors
from qat.formats.base import linear_names, write_directory
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=24),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
}
SCHEMES = {
    "w4_g32": Scheme(IntGrid(4), PerGroup(32), convention="signed"),
    "w3_g32": Scheme(IntGrid(3), PerGroup(32), convention="signed"),
    "w8_channel_asym": Scheme(IntGrid(8), PerChannel(), symmetric=False),
}
EMBEDDED = {  # of linears, of the embedding
    "w4_embed8": (SCHEMES["w4_g32"], Scheme(IntGrid(8), PerChannel())),
    "w3_embed4_asym": (SCHEMES["w3_g32"], Scheme(IntGrid(4), PerGroup(32), symmetric=False)),
}
PROMPTS = [[7, 3, 200, 45, 9], [11], list(range(40, 77)), [250, 1, 1, 2, 90, 33, 8, 64, 128, 255, 0, 17]]
NEW = 32


@dataclass
class Saved:
    """A checkpoint, and the Hugging Face model that it must agree with, in fp32."""

    path: Path
    model: PreTrainedModel
    quantized: dict[str, list[Sequence]] = field(default_factory=dict)  # what it says with a quantized cache

    def greedy(self, prompt: list[int], count: int = NEW) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return out[0, len(prompt) :].tolist()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].float()


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at 1 and biases at 0, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.3)
            parameter.copy_(parameter.bfloat16())
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that characters beyond ASCII take several."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
    return fast


def quantize(model: PreTrainedModel, scheme: Scheme) -> tuple[dict[str, QuantizedTensor], Recipe]:
    """RTN of every decoder linear."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    tensors = {
        n: QuantizedTensor(*rtn(m.weight, scheme, torch.bfloat16), scheme, tuple(m.weight.shape))
        for n, m in linears.items()
    }
    return tensors, Recipe({"all": Rule(r"model\.layers\..*proj", scheme)})


def add_embedding(
    path: Path, model: PreTrainedModel, recipe: Recipe, tensors: dict[str, QuantizedTensor], scheme: Scheme
) -> None:
    """Writes a checkpoint with a packed embedding as other tools do; `save` refuses it, since transformers fails."""
    weight = model.get_input_embeddings().weight.detach()
    codes, scale, zero_point = rtn(weight, scheme, torch.bfloat16)
    tensors["model.embed_tokens"] = QuantizedTensor(codes, scale, zero_point, scheme, tuple(weight.shape))
    config = compressed_tensors.quantization_config(recipe, tensors, linear_names(model))
    state = compressed_tensors.state(model, recipe, tensors, {}, torch.bfloat16)
    write_directory(path, model, byte_tokenizer(), state, config, torch.bfloat16)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`saved(family)` or `saved(family, scheme)`: the checkpoint, made once."""
    made: dict[tuple[str, str | None], Saved] = {}

    def make(family: str, scheme: str | None = None) -> Saved:
        if (family, scheme) not in made:
            path = tmp_path_factory.mktemp("checkpoints") / f"{family}_{scheme}"
            model = tiny(FAMILIES[family])
            if scheme is None:
                model.save_pretrained(path)
                byte_tokenizer().save_pretrained(path)
            else:
                linears, table = EMBEDDED.get(scheme) or (SCHEMES[scheme], None)
                tensors, recipe = quantize(model, linears)
                if table is None:
                    compressed_tensors.save(path, model, recipe, tensors, {}, byte_tokenizer())
                else:
                    add_embedding(path, model, recipe, tensors, table)
                for name, tensor in tensors.items():
                    model.get_submodule(name).weight.data = tensor.dequantize(torch.float32)
            made[family, scheme] = Saved(path, model)
        return made[family, scheme]

    return make
