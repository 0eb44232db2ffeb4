"""Tiny random models, a byte tokenizer and prepared tokens: everything offline, in milliseconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat.data.text import Tokens, load, save, tokenizer_digest
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.qtensor import QuantizedTensor, consecutive
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme


def tiny(layers: int = 2, tied: bool = True, **overrides: object) -> LlamaForCausalLM:
    """A random Llama whose parameters bf16 holds exactly, as `models.hf.load` returns them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=0,
        use_cache=False,
        **overrides,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.bfloat16())
    return model


def scheme(bits: int = 4, group_size: int = 32, symmetric: bool = True) -> Scheme:
    return Scheme(IntGrid(bits), PerGroup(group_size), symmetric, convention="signed")  # as recipes in groups have it


def recipe(bits: int = 4, group_size: int = 32, symmetric: bool = True, kv: str | None = None) -> Recipe:
    rules = {"linears": Rule(".*_proj", scheme(bits, group_size, symmetric)), "head": Rule("lm_head", None)}
    return Recipe(rules, None if kv is None else KINDS[kv])


def embedded(weight: Scheme | None = None, bits: int = 4) -> Recipe:
    """`recipe` with the embedding quantized, too; 8 bits by row where nothing else is said."""
    return Recipe(
        recipe(bits).rules | {"embeddings": Rule(".*embed_tokens", weight or Scheme(IntGrid(8), PerChannel()))}
    )


def scattered(tensor: QuantizedTensor, seed: int = 0) -> QuantizedTensor:
    """The same codes and scales, but groups are of in-features here and there: another weight, with a g_idx."""
    columns = tensor.shape[1]
    places = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return replace(tensor, g_idx=consecutive(columns, tensor.scale.shape[1])[places])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; token 0 is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet[:255])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=template)


def tokens(path: Path, train: int = 8192, held_out: int = 1024) -> Tokens:
    """Random streams with some structure: a token repeats the one before it half of the time."""
    generator = np.random.default_rng(0)
    streams = {}
    for split, size in (("train", train), ("validation", held_out), ("test", held_out)):
        stream = generator.integers(1, 256, size, dtype=np.int32)
        repeat = generator.random(size) < 0.5
        stream[1:][repeat[1:]] = stream[:-1][repeat[1:]]
        streams[split] = stream
    save(path, streams, {"source": "test"}, tokenizer_digest(byte_tokenizer()))
    return load(path)
