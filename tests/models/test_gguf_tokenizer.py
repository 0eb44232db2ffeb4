"""A tokenizer in a GGUF file is the tokenizer, as transformers reads it from there; or it is not written."""

import gguf
import pytest
import torch
from tiny import byte_tokenizer, recipe, tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qat.formats import gguf as formats
from qat.models.gguf_tokenizer import LLAMA3, QWEN2, add_tokenizer, splitting
from qat.nn.observers.minmax import MinMax
from qat.ptq.rtn import rtn

TEXT = "the hat, 12 hens: he's 1234\n\n  done\tHEN"
MERGES = [("h", "e"), ("1", "2"), ("12", "3"), ("\u0120", "he"), ("'", "s")]  # \u0120: a space, as bytes are written
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


def split(pattern):
    return sequence(pre_tokenizers.Split(Regex(pattern), "isolated"), SPLIT)


def make(steps=BYTES, merges=MERGES, template="{{ messages[0]['content'] }}", **kwargs):
    words = ["<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, **kwargs)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", chat_template=template
    )


def written(path, tokenizer, size=300):
    """Fields of a file that holds nothing but a tokenizer; None if it was not written."""
    writer = gguf.GGUFWriter(path, "llama")
    if not add_tokenizer(writer, tokenizer, size):
        return None
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_tokens_kinds_and_merges(tmp_path):
    tokenizer = make()
    tokenizer.add_tokens(["user"])
    fields = written(tmp_path / "t.gguf", tokenizer)
    count = len(tokenizer)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:count] == tokenizer.convert_ids_to_tokens(range(count))
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, 300)]
    assert kinds[:3] == [3, 3, 1]  # control, control, normal
    assert kinds[count - 1 :] == [4] + [5] * (300 - count)  # the user's, and unused ones
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in MERGES]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.bos_token_id"]) == (0, 1)
    assert "tokenizer.ggml.unknown_token_id" not in fields
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_tokenizer_that_begins_with_bos_says_so(tmp_path):
    tokenizer = make()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert written(tmp_path / "t.gguf", tokenizer)["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(
    ("steps", "kwargs", "name"),
    [
        (BYTES, {}, "gpt-2"),
        (sequence(pre_tokenizers.Digits(individual_digits=True), BYTES), {}, "smollm"),
        (split(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        (split(QWEN2), {}, "qwen2"),
        (split(LLAMA3), {}, None),  # llama.cpp's llama-bpe ignores merges
        (BYTES, {"ignore_merges": True}, None),
        (sequence(pre_tokenizers.Digits(individual_digits=False), BYTES), {}, None),
        (split(r"\s+"), {}, None),
        (sequence(pre_tokenizers.Split(Regex(QWEN2), "removed"), SPLIT), {}, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}, None),
        (pre_tokenizers.Whitespace(), {}, None),
        (BYTES, {"merges": []}, None),
    ],
)
def test_only_ways_to_split_that_llama_cpp_knows_by_name_are_written(tmp_path, steps, kwargs, name):
    fields = written(tmp_path / "t.gguf", make(steps, **kwargs))
    assert (fields and fields["tokenizer.ggml.pre"]) == name


def test_normalizers_and_vocabularies_that_do_not_fit(tmp_path):
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert splitting({"pre_tokenizer": step}) == "gpt-2"
    assert splitting({"pre_tokenizer": step, "normalizer": {"type": "NFC"}}) is None
    assert splitting({"pre_tokenizer": None}) is splitting({}) is None
    assert written(tmp_path / "a.gguf", make(), size=len(make())) is not None
    assert written(tmp_path / "b.gguf", make(), size=len(make()) - 1) is None


def test_transformers_reads_the_same_tokenizer_from_the_file(tmp_path):
    tokenizer, model = make(), tiny()
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
    tensors = rtn(model, recipe(), [], observer=MinMax()).tensors
    formats.save(tmp_path / "m", model, recipe(), tensors, {}, tokenizer)
    read = AutoTokenizer.from_pretrained(tmp_path / "m", gguf_file=formats.FILE)
    assert read(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    beside = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert beside(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_without_a_name_the_file_has_none(tmp_path):
    """The byte tokenizer merges nothing; llama.cpp refuses the file, and transformers reads what lies beside it."""
    tensors = rtn(tiny(), recipe(), [], observer=MinMax()).tensors
    formats.save(tmp_path / "m", tiny(), recipe(), tensors, {}, byte_tokenizer())
    assert not [key for key in gguf.GGUFReader(tmp_path / "m" / formats.FILE).fields if key.startswith("tokenizer")]
    assert AutoTokenizer.from_pretrained(tmp_path / "m")(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
