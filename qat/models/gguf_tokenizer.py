"""A byte-level BPE tokenizer in GGUF's words, where llama.cpp has a name for how it splits text.

llama.cpp does not read how a tokenizer splits text into words before merging: it knows some ways by name, and takes
another for the default one. So a tokenizer whose way has no name here is not written, and llama.cpp refuses the file
instead of reading other tokens from the same text.
"""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # their word: ours
Kind = gguf.TokenType


def splitting(content: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a `tokenizer.json` splits text; None if it has none."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    first, by_bytes = [dict(step) for step in steps[:-1]], steps[-1].get("use_regex", True)
    normalizer = (content.get("normalizer") or {}).get("type")
    if not first and by_bytes and normalizer is None:
        return "gpt-2"
    if len(first) != 1:
        return None
    if first[0] == {"type": "Digits", "individual_digits": True} and by_bytes and normalizer is None:
        return "smollm"
    if first[0].get("type") != "Split" or first[0].get("behavior") != "Isolated" or by_bytes:
        return None
    pattern = (first[0].get("pattern") or {}).get("Regex")
    if pattern == LLAMA3 and normalizer is None:
        return "llama-bpe"
    return "qwen2" if pattern == QWEN2 and normalizer in (None, "NFC") else None


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    """Writes a tokenizer into a file, chat template included.

    Args:
        writer: The file.
        tokenizer: A tokenizer of any kind.
        size: The model's vocabulary; ids that the tokenizer leaves free are named as unused.

    Returns:
        Whether it was written.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model, name = content.get("model", {}), splitting(content)
    ids, whole = tokenizer.get_vocab(), bool(model.get("ignore_merges"))  # words that are tokens are not merged to
    if name is None or model.get("type") != "BPE" or whole is not (name == "llama-bpe"):
        return False
    if not model["merges"] or max(ids.values()) >= size:  # llama.cpp takes no file without merges
        return False
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [Kind.UNUSED] * size
    for token, i in ids.items():
        tokens[i], kinds[i] = token, Kind.NORMAL
    for added in content.get("added_tokens", []):
        kinds[added["id"]] = Kind.CONTROL if added["special"] else Kind.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for key, ours in SPECIAL.items():
        if (found := getattr(tokenizer, f"{ours}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", found)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return True
