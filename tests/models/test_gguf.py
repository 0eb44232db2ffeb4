"""GGUF files are parsed once, and what is parsed is what the `gguf` package parses."""

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, get_tensor_name_map

from qat.models import hf
from qat.models.gguf import Reader, parsed_once


@pytest.fixture
def file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(128)
    writer.add_token_list(["a", "é", "東"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_a_plain_array_says_what_the_memory_map_says(file):
    ours, theirs = Reader(file), GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for field, other in zip(ours.fields.values(), theirs.fields.values(), strict=True):
        assert (field.types, field.data, field.contents()) == (other.types, other.data, other.contents())
        assert all(np.array_equal(a, b) for a, b in zip(field.parts, other.parts, strict=True))
    for tensor, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(tensor.data, other.data)
    assert not ours.data.flags.writeable


def test_openings_share_one_reader_and_leave_the_package_as_it_was(file):
    with parsed_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
    assert gguf.GGUFReader is GGUFReader
    assert gguf.get_tensor_name_map is get_tensor_name_map


@pytest.mark.slow
def test_a_conversion_parses_its_file_once(demo, tmp_path, monkeypatch):
    parsed, init = [], GGUFReader.__init__
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    monkeypatch.setattr(GGUFReader, "__init__", lambda self, path: (parsed.append(path), init(self, path))[1])
    hf.load(path=demo)
    hf.load(path=demo)
    assert len(parsed) == 1
