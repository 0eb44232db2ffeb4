"""Law (f) for GPTQ's layout: load(save(x)) == x, golden bytes, an independent decoder, refusals, damage."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, recipe, scattered, scheme, tiny

from qat.formats import gptq
from qat.formats.base import file_bytes
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn as rtn_method

BF16, F16 = torch.bfloat16, torch.float16
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
SCHEMES = [
    Scheme(IntGrid(bits), granularity, symmetric)
    for bits in gptq.BITS
    for granularity in (PerGroup(16), PerGroup(32), PerChannel())
    for symmetric in (True, False)
]


def quantized(s, shape=(64, 96), dtype=BF16):
    codes, scale, zero = rtn(torch.randn(shape) * 0.1, s, dtype)
    return QuantizedTensor(codes, scale, zero, s, shape)


def save(path, rules, dtype=BF16, scatter=False, **kwargs):
    model = tiny(**kwargs)
    changes = rtn_method(model, rules, [], observer=MinMax(), dtype=dtype)
    if scatter:
        changes.tensors = {name: scattered(tensor) for name, tensor in changes.tensors.items()}
    gptq.save(path, model, rules, changes.tensors, changes.folded, byte_tokenizer(), dtype)
    return changes


def same(a, b):
    zero = a.zero_point is None if b.zero_point is None else torch.equal(a.zero_point, b.zero_point)
    scale = a.scale.dtype == b.scale.dtype and torch.equal(a.scale, b.scale)
    places = a.g_idx is b.g_idx is None or torch.equal(a.g_idx, b.g_idx)
    return torch.equal(a.codes, b.codes) and scale and zero and places and a.scheme == b.scheme


def decoded(parts, bits, v1):
    """Written down from the layout, bit by bit: W = scales[g_idx] * (u - z), in fp32 `[O, I]`."""

    def fields(words, axis):
        words = words.numpy() if axis else words.numpy().T
        stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        values = (stream.reshape(len(words), -1, bits).astype(np.int64) << np.arange(bits)).sum(-1)
        return values if axis else values.T

    u, z, g = fields(parts["qweight"], 0), fields(parts["qzeros"], 1) + v1, parts["g_idx"].long().numpy()
    return torch.from_numpy((parts["scales"].float().numpy()[g] * (u - z[g]).astype(np.float32)).T)


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (96, 160)], ids=str)
@pytest.mark.parametrize("s", SCHEMES, ids=str)
def test_tensors_come_back_and_the_layouts_own_formula_decodes_them(s, shape):
    tensor, version = quantized(s, shape), gptq.V1 if s.symmetric else gptq.V2
    parts = gptq.pack_tensor(Q, tensor, version)
    groups = tensor.scale.shape[1]
    assert {key: tuple(value.shape) for key, value in parts.items()} == {
        "qweight": (shape[1] * s.grid.bits // 32, shape[0]),
        "qzeros": (groups, shape[0] * s.grid.bits // 32),
        "scales": (groups, shape[0]),
        "g_idx": (shape[1],),
    }
    assert same(gptq.unpack_tensor(Q, parts, s, version, BF16), tensor)
    assert torch.equal(decoded(parts, s.grid.bits, s.symmetric), tensor.dequantize(torch.float32))
    if groups > 1:  # the same, with groups of in-features here and there
        tensor = scattered(tensor)
        parts = gptq.pack_tensor(Q, tensor, version)
        assert same(gptq.unpack_tensor(Q, parts, s, version, BF16), tensor)
        assert torch.equal(decoded(parts, s.grid.bits, s.symmetric), tensor.dequantize(torch.float32))


def test_golden_g_idx(tmp_path):
    """The group of in-feature i at place i, and the word without which vLLM would pass over it."""
    places = torch.tensor([1, 0, 0, 1] * 8, dtype=torch.int32)
    one = replace(quantized(Scheme(IntGrid(4), PerGroup(16)), (32, 32)), g_idx=places)
    g_idx = gptq.pack_tensor(Q, one, gptq.V1)["g_idx"]
    assert g_idx.numpy().tobytes() == bytes([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0] * 8)
    assert gptq.pack_tensor(Q, replace(one, g_idx=None), gptq.V1)["g_idx"].tolist() == [0] * 16 + [1] * 16
    assert gptq.quantization_config({Q: one}, [Q], BF16)["desc_act"] is True
    assert gptq.quantization_config({Q: replace(one, g_idx=None)}, [Q], BF16)["desc_act"] is False


@pytest.mark.parametrize("symmetric", [True, False])
def test_law_f_round_trip_with_a_g_idx(tmp_path, symmetric):
    changes = save(tmp_path / "m", recipe(4, symmetric=symmetric), scatter=True)
    checkpoint = gptq.load(tmp_path / "m")
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in changes.tensors.items())
    assert all(tensor.g_idx is not None for tensor in checkpoint.tensors.values())
    say(desc_act=False)(tmp_path / "m")
    with pytest.raises(ValueError, match=r"config\.json: \S+\.g_idx puts in-features .* desc_act is false, .*set it"):
        dict(gptq.load(tmp_path / "m").tensors)


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_golden_words_of_symmetric_zeros(bits, word):
    tensor = quantized(Scheme(IntGrid(bits), PerGroup(32)))
    assert set((gptq.pack_tensor(Q, tensor, gptq.V1)["qzeros"].flatten().long() & 0xFFFFFFFF).tolist()) == {word}
    second = {2: 0xAAAAAAAA, 4: 0x88888888, 8: 0x80808080}[bits]
    assert set((gptq.pack_tensor(Q, tensor, gptq.V2)["qzeros"].long() & 0xFFFFFFFF).flatten().tolist()) == {second}


def test_golden_words_of_codes():
    codes = torch.zeros(32, 32, dtype=torch.int8)
    codes[5, :8] = torch.tensor([-8, -7, -6, -5, -4, -3, 6, 7])
    one = QuantizedTensor(codes, torch.ones(32, 1, dtype=BF16), None, Scheme(IntGrid(4), PerChannel()), (32, 32))
    words = gptq.pack_tensor(Q, one, gptq.V1)["qweight"]
    assert words[0, 5].item() & 0xFFFFFFFF == 0xFE543210
    assert set((words[1:].flatten().long() & 0xFFFFFFFF).tolist()) == {0x88888888}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_law_f_round_trip(tmp_path, bits, symmetric, dtype):
    changes = save(tmp_path / "m", recipe(bits, symmetric=symmetric), dtype)
    checkpoint = gptq.load(tmp_path / "m")
    assert checkpoint.tensors.keys() == changes.tensors.keys()
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in changes.tensors.items())
    assert {rule.weight for rule in checkpoint.recipe.rules.values()} == {scheme(bits, symmetric=symmetric)}
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert file_bytes(gptq.state(tiny(), recipe(4), changes.tensors, {}, dtype)) == size


def test_the_config_is_what_loaders_expect(tmp_path):
    save(tmp_path / "m", recipe())
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "m" / "quantize_config.json").read_text()) == said
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert expected.items() <= said.items()
    assert said["checkpoint_format"] == "gptq"
    assert "dynamic" not in said
    assert {str(t.dtype) for n, t in load_file(tmp_path / "m" / "model.safetensors").items() if "scales" in n} == {
        "torch.float16"
    }


def test_transformers_reads_the_config(tmp_path):
    from transformers import GPTQConfig

    save(tmp_path / "m", recipe(4, symmetric=False))
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    read = GPTQConfig.from_dict(said)
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (4, 32, False, False)
    assert read.to_dict()["checkpoint_format"] == "gptq_v2"


def test_several_schemes_and_what_is_left_alone_stand_in_dynamic(tmp_path):
    rules = {
        "all": Rule(".*_proj", scheme(4)),
        "down": Rule(".*down_proj", Scheme(IntGrid(8), PerChannel(), symmetric=False)),
        "up": Rule(r".*layers\.1\.mlp\.up_proj", None),
    }
    changes = save(tmp_path / "m", Recipe(rules))
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert said["dynamic"][r"-:^model\.layers\.1\.mlp\.up_proj$"] == {}
    assert said["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"] == {"bits": 8, "group_size": -1, "sym": False}
    assert said["checkpoint_format"] == "gptq_v2"
    checkpoint = gptq.load(tmp_path / "m")
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in changes.tensors.items())
    assert "model.layers.1.mlp.up_proj.weight" in checkpoint.plain


def test_an_entry_of_dynamic_matches_from_the_beginning_of_a_name_and_the_first_wins(whole):
    """As GPTQModel reads it, with `re.match`: nothing says where a name ends, but where it begins."""
    said = json.loads((whole / "config.json").read_text())["quantization_config"]
    entries = [
        (r"-:mlp\.up_proj", {}),
        (r"layers\.0", {"bits": 2}),
        (r"+:model\.layers\.0", {"bits": 8}),
        (".*", {"bits": 3}),
    ]
    found = gptq.module_schemes(whole / "config.json", {**said, "dynamic": dict(entries)}, [Q, Q.replace("0", "1"), UP])
    assert [s.grid.bits for s in found.values()] == [8, 3, 8]


def test_a_codebook_of_integers_is_written_on_its_integer_grid(tmp_path):
    rules = Recipe({"all": Rule(".*_proj", Scheme(Codebook("ternary"), PerGroup(32)))})
    changes = rtn_method(tiny(), rules, [], observer=MinMax())
    own, tensors = gptq.expressed(rules, changes.tensors)
    gptq.save(tmp_path / "m", tiny(), own, tensors, {}, None)
    found = gptq.load(tmp_path / "m").tensors[Q]
    assert found.scheme.grid == IntGrid(2)
    assert torch.equal(found.dequantize(BF16), changes.tensors[Q].dequantize(BF16))


@pytest.mark.parametrize(
    ("weight", "input", "kind", "message"),
    [
        (scheme(), Scheme(IntGrid(8), PerToken(), dynamic=True), "Linear", "its input scheme int8_token_dynamic"),
        (Scheme(IntGrid(4), PerChannel(), dynamic=True), None, "Linear", "a dynamic scale is never stored"),
        (Scheme(IntGrid(4), PerTensor()), None, "Linear", "scales per group or channel"),
        (scheme(5), None, "Linear", "carries integers of 2, 3, 4, 8 bits; int5_g32"),
        (Scheme(FloatGrid("e4m3"), PerChannel()), None, "Linear", "carries integers"),
        (scheme(8), None, "Embedding", "packs linears only"),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_module(weight, input, kind, message):
    with pytest.raises(ValueError, match=f"^{Q}: .*{message}"):
        gptq.check_scheme(Q, weight, input, kind)


def test_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.kv: gptq has no word"):
        save(tmp_path / "m", Recipe(recipe().rules, KINDS["int8"]))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_sizes_that_do_not_fill_words_are_refused_by_module(shape):
    with pytest.raises(ValueError, match=rf"^{Q}: gptq packs multiples of 32 rows and columns; this is \[{shape[0]}, "):
        gptq.pack_tensor(Q, quantized(Scheme(IntGrid(4), PerGroup(16)), shape), gptq.V1)


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        (BF16, 0.1, True),
        (BF16, 1.9921875 * 2.0**-17, True),
        (BF16, 1.9921875 * 2.0**-18, False),
        (BF16, 2.0**-24, True),
        (BF16, 2.0**-25, False),
        (BF16, 65280.0, True),
        (BF16, 65536.0, False),
        (torch.float32, 0.5, True),
        (torch.float32, 0.1, False),
    ],
)
def test_scales_that_fp16_does_not_hold_are_refused_by_module(dtype, value, fits):
    tensor = quantized(scheme(), dtype=dtype)
    tensor.scale[:] = 1
    tensor.scale[3, 1] = value
    if fits:
        parts = gptq.pack_tensor(Q, tensor, gptq.V1)
        assert same(gptq.unpack_tensor(Q, parts, tensor.scheme, gptq.V1, dtype), tensor)
        return
    with pytest.raises(
        ValueError, match=rf"^{Q}: the scale {float(tensor.scale[3, 1])!r} .* Use export\.dtype=float16"
    ):
        gptq.pack_tensor(Q, tensor, gptq.V1)


def test_a_scale_of_another_dtype_than_the_storage_dtype_is_refused(tmp_path):
    rules = Recipe({"a": Rule(".*_proj", Scheme(IntGrid(4), PerGroup(32), scale_dtype="float16"))})
    with pytest.raises(ValueError, match=rf"^{Q}: scale in torch\.float16, but the storage dtype is torch\.bfloat16"):
        save(tmp_path / "m", rules)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gptq") / "m"
    save(path, recipe(4))
    return path


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory):
    path = tmp_path_factory.mktemp("gptq") / "a"
    save(path, recipe(4, symmetric=False))
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
    (put(f"{Q}.g_idx", lambda t: None), f"tensor {Q}.g_idx is missing"),
    (put(f"{Q}.qweight", lambda t: None), rf"tensor {Q}\.\w+ belongs to no quantized module"),
    (put(f"{Q}.weight", lambda t: torch.ones(64, 64)), f"tensor {Q}.weight lies beside the packed weight of {Q}"),
    (put("stray.scales", lambda t: torch.ones(1)), r"tensor stray\.scales belongs to no quantized module"),
    (put(f"{Q}.qweight", lambda t: t[:-1].contiguous()), rf"model\.safetensors: {Q}\.qweight: .* needs \(8, 64\)"),
    (put(f"{Q}.qweight", lambda t: t.long()), rf"{Q}\.qweight: torch\.int64"),
    (put(f"{Q}.qzeros", lambda t: t[:, :-1].contiguous()), rf"{Q}\.qzeros: .* needs \(2, 8\)"),
    (put(f"{Q}.scales", lambda t: t[:1].contiguous()), rf"{Q}\.scales: .* needs \(2, 64\)"),
    (put(f"{Q}.scales", lambda t: t * 0), rf"{Q}: a scale is zero"),
    (put(f"{Q}.scales", lambda t: t * torch.nan), rf"{Q}: a scale is zero or not finite"),
    (put(f"{Q}.scales", lambda t: t.view(torch.int16)), rf"{Q}: a scale is zero"),
    (put(f"{Q}.scales", lambda t: t + 2.0**-14), rf"{Q}: .* none that torch\.bfloat16 holds"),
    (put(f"{Q}.g_idx", lambda t: t.flip(0)), rf"{Q}\.g_idx puts in-features into groups in another order"),
    (put(f"{Q}.g_idx", lambda t: t * 0), rf"{Q}\.g_idx torch.int32 \(64,\): .* each of 2 groups as often"),
    (put(f"{Q}.g_idx", lambda t: t + 1), rf"{Q}\.g_idx torch.int32 \(64,\): .* each of 2 groups as often"),
    (say(quant_method="awq"), "quantized by 'awq'; this reader serves gptq"),
    (say(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    (say(pack_dtype="int16"), "pack_dtype 'int16'"),
    (say(bits=5), "bits 5; expected 2, 3, 4, 8"),
    (say(bits=8), r"down_proj\.qweight: .* 8-bit \[64, 128\] needs \(32, 64\)"),
    (say(group_size="all"), "group_size 'all'"),
    (say(sym="yes"), "sym 'yes'"),
    (say(meta={"scale_dtype": "float8"}), "scales in 'float8'"),
    (say(group_size=0), "group_size 0; expected a positive integer"),
    (say(group_size=48), r"model\.safetensors: model\.\S+: group_size=48 does not divide"),
    (say(dynamic={"+:(": {}}), "dynamic maps regular expressions to settings"),
    (say(dynamic={"+:x": 3}), "dynamic maps regular expressions to settings"),
    (say(dynamic=["x"]), "dynamic maps regular expressions to settings"),
    (say(dynamic={"-:.*q_proj": {}}), f"leaves out {Q}, which is packed"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(whole, tmp_path, damage, message):
    path = shutil.copytree(whole, tmp_path / "m")
    damage(path)
    with pytest.raises(ValueError, match=message):
        dict(gptq.load(path).tensors)


def test_a_file_without_a_packed_module_is_refused(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in gptq.PARTS}
    save_file(kept, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"says quantized, but no tensor ends in qweight"):
        gptq.load(path)


def test_zeros_of_the_other_version_are_a_named_error(whole, tmp_path):
    """Version 2 files that say version 1 exist: read by their label, every weight is off by a step."""
    path = shutil.copytree(whole, tmp_path / "m")
    say(checkpoint_format="gptq_v2")(path)
    with pytest.raises(ValueError, match=r"all 7, as gptq stores a symmetric zero, but checkpoint_format says gptq_v2"):
        dict(gptq.load(path).tensors)
    put(f"{Q}.qzeros", lambda t: torch.full_like(t, 0x88888888 - 2**32))(path)
    say(checkpoint_format="gptq")(path)
    with pytest.raises(ValueError, match=rf"{Q}\.qzeros: all 8, as gptq_v2 stores .* set it to gptq_v2"):
        dict(gptq.load(path).tensors)
    put(f"{Q}.qzeros", lambda t: torch.full_like(t, 0x66666666))(path)
    with pytest.raises(ValueError, match="sym is true, but not every stored zero is 7"):
        dict(gptq.load(path).tensors)


def test_version_1_with_zero_points_is_read_and_its_ambiguous_zero_refused(asymmetric, tmp_path):
    """What other tools write: z - 1, where z = 0 has wrapped to 15."""
    expected = {name: tensor.zero_point for name, tensor in gptq.load(asymmetric).tensors.items()}
    path = shutil.copytree(asymmetric, tmp_path / "m")
    say(checkpoint_format="gptq")(path)
    tensors = dict(gptq.load(path).tensors)
    assert all(torch.equal(tensors[name].zero_point, zero + 1) for name, zero in expected.items())
    put(f"{Q}.qzeros", lambda t: torch.full_like(t, -1))(path)
    with pytest.raises(ValueError, match=rf"{Q}\.qzeros: 15 in gptq is a zero of 16 or a wrapped 0"):
        dict(gptq.load(path).tensors)


def test_what_other_tools_write_is_read_without_our_words(whole, tmp_path):
    """No `meta`, an old `format` key or none: scales are what the file holds."""
    path = shutil.copytree(whole, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    for key in ("meta", "checkpoint_format", "pack_dtype"):
        del config["quantization_config"][key]
    (path / "config.json").write_text(json.dumps(config))
    (path / "verify.json").unlink()
    tensor, ours = gptq.load(path).tensors[Q], gptq.load(whole).tensors[Q]
    assert tensor.scale.dtype == F16
    assert tensor.scheme.scale_dtype == "float16"
    assert torch.equal(tensor.dequantize(torch.float32), ours.dequantize(torch.float32))
