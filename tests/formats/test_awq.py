"""Law (f) for AWQ's layout: load(save(x)) == x, golden bytes, the compressed-tensors library's converter, damage."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, recipe, scheme, tiny

from qat.formats import awq
from qat.formats.base import file_bytes
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn as rtn_method

BF16 = torch.bfloat16
Q = "model.layers.0.self_attn.q_proj"
ASYMMETRIC = [Scheme(IntGrid(4), g, symmetric=False) for g in (PerGroup(16), PerGroup(32), PerChannel())]


def save(path, rules, dtype=BF16):
    model = tiny()
    changes = rtn_method(model, rules, [], observer=MinMax(), dtype=dtype)
    own, tensors = awq.expressed(rules, changes.tensors)
    awq.save(path, model, own, tensors, changes.folded, byte_tokenizer(), dtype)
    return changes, tensors


def same(a, b):
    scale = a.scale.dtype == b.scale.dtype and torch.equal(a.scale, b.scale)
    return torch.equal(a.codes, b.codes) and scale and torch.equal(a.zero_point, b.zero_point) and a.scheme == b.scheme


@pytest.mark.parametrize("shape", [(8, 32), (24, 96), (64, 160)], ids=str)
@pytest.mark.parametrize("s", ASYMMETRIC, ids=str)
def test_tensors_come_back(s, shape):
    codes, scale, zero = rtn(torch.randn(shape) * 0.1, s, BF16)
    tensor = QuantizedTensor(codes, scale, zero, s, shape)
    parts = awq.pack_tensor(Q, tensor)
    groups = scale.shape[1]
    found = {key: (value.dtype, *value.shape) for key, value in parts.items()}
    assert found == {
        "qweight": (torch.int32, shape[1], shape[0] // 8),
        "qzeros": (torch.int32, groups, shape[0] // 8),
        "scales": (torch.float16, groups, shape[0]),
    }
    assert same(awq.unpack_tensor(Q, parts, s, BF16), tensor)


def test_golden_words():
    """Column c of a word lies in nibble (0, 4, 1, 5, 2, 6, 3, 7)[c]; a symmetric zero is 8."""
    codes = torch.arange(8, dtype=torch.int8)[:, None].expand(8, 32) - 8
    one = torch.ones(8, 1, dtype=BF16)
    symmetric = QuantizedTensor(codes, one, None, Scheme(IntGrid(4), PerChannel()), (8, 32))
    tensor = awq.expressed(Recipe(), {Q: symmetric})[1][Q]
    parts = awq.pack_tensor(Q, tensor)
    assert set((parts["qweight"].long() & 0xFFFFFFFF).flatten().tolist()) == {0x75316420}
    assert set((parts["qzeros"].long() & 0xFFFFFFFF).flatten().tolist()) == {0x88888888}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", [PerGroup(32), PerChannel()], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_law_f_round_trip_and_the_library_decodes_the_same(tmp_path, symmetric, granularity, dtype):
    from qat.evaluation.foreign import converter

    s = Scheme(IntGrid(4), granularity, symmetric)
    changes, tensors = save(tmp_path / "m", Recipe({"a": Rule(".*_proj", s)}), dtype)
    checkpoint = awq.load(tmp_path / "m")
    assert checkpoint.tensors.keys() == changes.tensors.keys()
    for name, tensor in changes.tensors.items():
        found = checkpoint.tensors[name]
        assert same(found, tensors[name])
        assert torch.equal(found.codes, tensor.codes)
        assert torch.equal(found.scale, tensor.scale)
        assert torch.equal(found.dequantize(torch.float32), tensor.dequantize(torch.float32))
    assert converter(checkpoint)["max_abs_diff"] == 0
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert file_bytes(awq.state(tiny(), checkpoint.recipe, tensors, {}, dtype)) == size


def test_the_config_is_what_loaders_expect(tmp_path):
    from transformers import AwqConfig

    save(tmp_path / "m", recipe())
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    assert expected.items() <= said.items()
    assert said["modules_to_not_convert"] == ["lm_head"]
    read = AwqConfig.from_dict(said)
    assert (read.bits, read.group_size, read.zero_point, read.format) == (4, 32, True, "gemm")


def test_a_codebook_of_integers_of_four_bits_is_none_of_ours():
    """Its levels are whole numbers of fewer bits: the format has four, and says so."""
    with pytest.raises(ValueError, match=f"^{Q}: awq carries integers of 4 bits; ternary"):
        awq.check_scheme(Q, Scheme(Codebook("ternary"), PerGroup(32)))


@pytest.mark.parametrize(
    ("weight", "input", "kind", "message"),
    [
        (scheme(), Scheme(IntGrid(8), PerToken(), dynamic=True), "Linear", "its input scheme int8_token_dynamic"),
        (Scheme(IntGrid(4), PerChannel(), dynamic=True), None, "Linear", "a dynamic scale is never stored"),
        (Scheme(IntGrid(4), PerTensor()), None, "Linear", "scales per group or channel"),
        (scheme(3), None, "Linear", "carries integers of 4 bits; int3_g32"),
        (scheme(8), None, "Linear", "carries integers of 4 bits; int8_g32"),
        (scheme(), None, "Embedding", "packs linears only"),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_module(weight, input, kind, message):
    with pytest.raises(ValueError, match=f"^{Q}: .*{message}"):
        awq.check_scheme(Q, weight, input, kind)


def test_two_group_sizes_are_refused_by_module(tmp_path):
    rules = Recipe(
        {"all": Rule(".*_proj", scheme()), "down": Rule(".*1.mlp.down_proj", Scheme(IntGrid(4), PerChannel()))}
    )
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: awq has one group size .* 32 .* not -1"):
        save(tmp_path / "m", rules)
    assert not (tmp_path / "m").exists()


def test_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.kv: awq has no word"):
        save(tmp_path / "m", Recipe(recipe().rules, KINDS["int8"]))


def test_rows_that_do_not_fill_words_and_scales_beyond_fp16_are_refused_by_module():
    s = ASYMMETRIC[1]
    codes, scale, zero = rtn(torch.randn(12, 64), s, BF16)
    with pytest.raises(ValueError, match=rf"^{Q}: awq packs multiples of 8 out-features; this has 12"):
        awq.pack_tensor(Q, QuantizedTensor(codes, scale, zero, s, (12, 64)))
    scale[1, 1] = 1.9921875 * 2.0**-18
    with pytest.raises(ValueError, match=rf"^{Q}: the scale 7\.59\S+e-06 in bfloat16 is none that fp16 holds"):
        awq.pack_tensor(Q, QuantizedTensor(codes[:8], scale[:8], zero[:8], s, (8, 64)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("awq") / "m"
    save(path, recipe())
    return path


def put(name, value):
    def change(path):
        tensors = load_file(path / "model.safetensors")
        tensors[name] = value(tensors.get(name))
        save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")

    return change


def say(**changes):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] |= changes
        (path / "config.json").write_text(json.dumps(config))

    return change


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE = [
    (cut, r"model\.safetensors: truncated or not a safetensors file"),
    (put(f"{Q}.scales", lambda t: None), f"tensor {Q}.scales is missing"),
    (put(f"{Q}.qzeros", lambda t: None), f"tensor {Q}.qzeros is missing"),
    (put(f"{Q}.qweight", lambda t: None), rf"tensor {Q}\.\w+ belongs to no quantized module"),
    (put(f"{Q}.weight", lambda t: torch.ones(64, 64)), f"tensor {Q}.weight lies beside the packed weight of {Q}"),
    (put("stray.qzeros", lambda t: torch.ones(1)), r"tensor stray\.qzeros belongs to no quantized module"),
    (put(f"{Q}.qweight", lambda t: t[:, :-1].contiguous()), rf"model\.safetensors: {Q}\.qweight: .* needs \(64, 8\)"),
    (put(f"{Q}.qweight", lambda t: t[:32].contiguous()), rf"{Q}\.qzeros: .* needs \(1, 8\)"),
    (put(f"{Q}.qweight", lambda t: t.flatten()), rf"{Q}\.qweight: \(512,\) .* expected matrices"),
    (put(f"{Q}.qzeros", lambda t: t.long()), rf"{Q}\.qzeros: torch\.int64"),
    (put(f"{Q}.scales", lambda t: t[:1].contiguous()), rf"{Q}\.scales: .* needs \(2, 64\)"),
    (put(f"{Q}.scales", lambda t: t * 0), rf"{Q}: a scale is zero"),
    (put(f"{Q}.scales", lambda t: t * torch.nan), rf"{Q}: a scale is zero or not finite"),
    (say(quant_method="gptq"), "quantized by 'gptq'; this reader serves awq"),
    (say(version="gemv"), "version 'gemv'; this reader serves 'gemm'"),
    (say(bits=8), "bits 8; this reader serves 4"),
    (say(zero_point=False), "zero_point False; this reader serves True"),
    (say(group_size=None), "group_size None; expected a positive integer"),
    (say(group_size=0), "group_size 0; expected a positive integer"),
    (say(group_size=48), r"model\.safetensors: model\.\S+: group_size=48 does not divide"),
    (say(meta=3), "scales in 3"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(whole, tmp_path, damage, message):
    path = shutil.copytree(whole, tmp_path / "m")
    damage(path)
    with pytest.raises(ValueError, match=message):
        dict(awq.load(path).tensors)


def test_a_code_that_the_library_reads_differently_is_named(whole, tmp_path):
    """Our reader of codes against the library's reading of the same file: a nibble order of our own would not do."""
    from dataclasses import replace

    from qat.evaluation.foreign import converter

    checkpoint = awq.load(whole)
    tensors = dict(checkpoint.tensors)
    tensors[Q] = replace(tensors[Q], codes=tensors[Q].codes.roll(1, 0))
    found = converter(replace(checkpoint, tensors=tensors))
    assert found["worst"] == Q
    assert found["max_abs_diff"] > 0
