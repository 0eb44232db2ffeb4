"""Law (f) for GGUF: load(save(x)) == x, golden blocks, the gguf package decodes to the last bit, refusals, damage."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, dequantize
from tiny import byte_tokenizer, recipe, scheme, tiny

from qat.formats import gguf
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn as rtn_method

BF16, F16 = torch.bfloat16, torch.float16
Q = "model.layers.0.self_attn.q_proj"
S4, S8 = scheme(4), scheme(8)
A4 = scheme(4, symmetric=False)


def quantized(s, shape=(24, 96), dtype=BF16):
    codes, scale, zero = rtn(torch.randn(shape) * 0.1, s, dtype)
    if zero is not None:  # powers of two: times any zero point they are fp16's
        scale = (2.0 ** torch.log2(scale.float()).ceil()).to(dtype)
    return QuantizedTensor(codes, scale, zero, s, shape)


def save(path, rules, dtype=BF16, model=None, change=dict):
    model = model or tiny()
    changes = rtn_method(model, rules, [], observer=MinMax(), dtype=dtype)
    own, tensors = gguf.expressed(rules, change(changes.tensors))
    gguf.save(path, model, own, tensors, changes.folded, byte_tokenizer(), dtype)
    return changes, tensors


def powers(tensors):
    """Scales as powers of two, so that Q4_1 holds every product with a zero point."""

    return {
        n: replace(t, scale=(2.0 ** torch.log2(t.scale.float()).ceil()).to(t.scale.dtype)) for n, t in tensors.items()
    }


def same(a, b):
    zero = a.zero_point is None if b.zero_point is None else torch.equal(a.zero_point, b.zero_point)
    scale = a.scale.dtype == b.scale.dtype and torch.equal(a.scale, b.scale)
    return torch.equal(a.codes, b.codes) and scale and zero and a.scheme == b.scheme


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (24, 96), (64, 160)], ids=str)
@pytest.mark.parametrize("s", [S4, A4, S8], ids=str)
def test_blocks_come_back_and_the_package_decodes_them(s, shape, dtype):
    tensor = quantized(s, shape, dtype)
    blocks, kind = gguf.pack_tensor(Q, tensor), gguf.type_of(s)
    assert same(gguf.unpack_tensor(Q, blocks, kind, dtype, s), tensor)
    decoded = torch.from_numpy(dequantize(blocks.numpy(), kind))
    assert torch.equal(decoded, tensor.dequantize(torch.float32))


def test_golden_blocks():
    """d = 1: 0x3C00. Nibble pairs are 16 apart; asymmetric zeros 5 make m = -5: 0xC500."""
    codes = (torch.arange(32, dtype=torch.int8) % 16 - 8)[None]
    codes[0, 16:] = 7
    one, zero = torch.ones(1, 1, dtype=BF16), torch.full((1, 1), -3, dtype=torch.int8)
    nibbles = bytes(0xF0 | j for j in range(16))
    found = gguf.pack_tensor(Q, QuantizedTensor(codes, one, None, S4, (1, 32))).numpy().tobytes()
    assert found == b"\x00\x3c" + nibbles
    found = gguf.pack_tensor(Q, QuantizedTensor(codes, one, zero, A4, (1, 32))).numpy().tobytes()
    assert found == b"\x00\x3c\x00\xc5" + nibbles
    eight = torch.arange(-128, -96, dtype=torch.int8)[None]
    found = gguf.pack_tensor(Q, QuantizedTensor(eight, one, None, S8, (1, 32))).numpy().tobytes()
    assert found == b"\x00\x3c" + bytes(range(128, 160))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("s", "kind"),
    [
        (S4, Type.Q4_0),
        (A4, Type.Q4_1),
        (S8, Type.Q8_0),
        (scheme(4, 64), Type.Q4_0),
        (Scheme(IntGrid(8), PerChannel()), Type.Q8_0),
        (Scheme(IntGrid(4), PerTensor()), Type.Q4_0),
    ],
    ids=str,
)
def test_law_f_round_trip_and_the_package_decodes_the_same(tmp_path, s, kind, dtype):
    rules = Recipe({"a": Rule(".*_proj", s)})
    changes, tensors = save(tmp_path / "m", rules, dtype, change=dict if s.symmetric else powers)
    checkpoint = gguf.load(tmp_path / "m")
    assert checkpoint.tensors.keys() == changes.tensors.keys()
    own = Scheme(IntGrid(s.grid.bits), PerGroup(32), s.symmetric, convention=s.convention)
    assert checkpoint.recipe.rule_for(Q)[1].weight == own
    stored = {t.name: t for t in GGUFReader(tmp_path / "m" / "model.gguf").tensors}
    for name, tensor in changes.tensors.items():
        found = checkpoint.tensors[name]
        assert same(found, tensors[name])
        assert torch.equal(found.codes, tensor.codes)
        if s.symmetric:
            assert torch.equal(found.dequantize(torch.float32), tensor.dequantize(torch.float32))
    down = stored["blk.1.ffn_down.weight"]
    assert down.tensor_type == kind
    ours = checkpoint.tensors["model.layers.1.mlp.down_proj"].dequantize(torch.float32)
    assert torch.equal(torch.from_numpy(dequantize(down.data, kind)), ours)
    own = tiny().state_dict()
    assert all(torch.equal(value.float(), own[name]) for name, value in checkpoint.plain.items())
    assert {value.dtype for value in checkpoint.plain.values()} == {dtype}


@pytest.mark.parametrize("family", ["llama", "llama_untied", "qwen2", "qwen3"])
def test_transformers_loads_the_same_weights_by_the_files_own_words(tmp_path, family):
    """Names, the order of rows, and the config, from metadata alone: transformers' own code puts them back."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from qat.evaluation.foreign import package, transformers_gguf

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    models = {
        "llama": lambda: tiny(),
        "llama_untied": lambda: tiny(tied=False),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, rope_theta=5e4)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=128)),
    }
    model = models[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    save(tmp_path / "m", recipe(), model=model)
    checkpoint = gguf.load(tmp_path / "m")
    assert package(checkpoint)["max_abs_diff"] == 0
    assert transformers_gguf(checkpoint, [])["max_abs_diff"] == 0


def test_bytes_are_what_arithmetic_says(tmp_path):
    _, tensors = save(tmp_path / "m", recipe())
    state = gguf.state(tiny(), recipe(), tensors, {}, BF16)
    quantized = sum(t.codes.numel() for t in tensors.values())
    assert sum(v.nbytes for v in state.values() if v.dtype == torch.uint8) == quantized * 4.5 / 8
    reader = GGUFReader(tmp_path / "m" / "model.gguf")
    assert {t.name: np.array(t.data).nbytes for t in reader.tensors} == {n: v.nbytes for n, v in state.items()}


@pytest.mark.parametrize(
    ("weight", "input", "kind", "message"),
    [
        (scheme(), Scheme(IntGrid(8), PerToken(), dynamic=True), "Linear", "its input scheme int8_token_dynamic"),
        (Scheme(IntGrid(4), PerChannel(), dynamic=True), None, "Linear", "a dynamic scale is never stored"),
        (scheme(4, 16), None, "Linear", "a scale for every 32 in-features; int4_g16_signed has smaller groups"),
        (scheme(3), None, "Linear", "integers of 4 bits, and symmetric ones of 8; int3_g32"),
        (scheme(8, symmetric=False), None, "Linear", "symmetric ones of 8; int8_g32_asym"),
        (scheme(), None, "Embedding", "packs linears only"),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_module(weight, input, kind, message):
    with pytest.raises(ValueError, match=f"^{Q}: .*{message}"):
        gguf.check_scheme(Q, weight, input, kind)


def test_a_model_or_a_cache_that_the_format_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.kv: gguf has no word"):
        save(tmp_path / "m", Recipe(recipe().rules, KINDS["int8"]))
    scaled = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rope_type 'linear' is not written"):
        gguf.check_model(scaled)
    other = tiny()
    other.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^model\.extra: GGUF has no name for it"):
        gguf.check_model(other)
    gguf.check_model(tiny())
    assert not (tmp_path / "m").exists()


def test_a_zero_point_whose_product_fp16_does_not_hold_is_refused_by_module():
    """bf16 has 8 bits, a zero up to 4 more, fp16 11: most modules of an asymmetric checkpoint are not Q4_1 exactly."""
    tensor = quantized(A4)
    tensor.scale[:], tensor.zero_point[:] = 1, 0
    tensor.scale[3, 1], tensor.zero_point[3, 1] = 1.9921875, 7  # 255/128 * 15 = 3825/128: 12 bits
    with pytest.raises(ValueError, match=f"^{Q}: the zero 15 times the scale 1.9921875 is none that fp16 holds"):
        gguf.pack_tensor(Q, tensor)
    tensor.zero_point[3, 1] = 6  # 3570/128: even, so 11 bits
    assert same(gguf.unpack_tensor(Q, gguf.pack_tensor(Q, tensor), Type.Q4_1, BF16, A4), tensor)


def test_scales_that_fp16_does_not_hold_are_refused_by_module():
    tensor = quantized(S4)
    tensor.scale[0, 2] = 1.9921875 * 2.0**-18
    with pytest.raises(ValueError, match=rf"^{Q}: the scale 7\.59\S+e-06 in bfloat16 .* Use export\.dtype=float16"):
        gguf.pack_tensor(Q, tensor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m"
    save(path, recipe(4, symmetric=False), change=powers)
    return path


def poke(name, offset, data):
    """Overwrites bytes of a tensor where they lie in the file."""

    def change(path):
        file = path / "model.gguf"
        at = next(t.data_offset for t in GGUFReader(file).tensors if t.name == name)
        content = bytearray(file.read_bytes())
        content[at + offset : at + offset + len(data)] = data
        file.write_bytes(content)

    return change


def say(**changes):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        for key, value in changes.items():
            (config if key in config else config["quantization_config"])[key] = value
        (path / "config.json").write_text(json.dumps(config))

    return change


def replaced(old, new):
    def change(path):
        file = path / "model.gguf"
        content = file.read_bytes()
        assert len(old) == len(new)
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))

    return change


def cut(size):
    return lambda path: (path / "model.gguf").write_bytes((path / "model.gguf").read_bytes()[:size])


DAMAGE = [
    (cut(-9), r"model\.gguf: truncated or not a GGUF file"),
    (cut(200), r"model\.gguf: truncated or not a GGUF file"),
    (cut(0), r"model\.gguf: truncated or not a GGUF file"),
    (lambda path: (path / "model.gguf").unlink(), r"model\.gguf: no such file; the checkpoint is incomplete"),
    (poke("blk.0.attn_v.weight", 0, b"\0\0"), r"layers\.0\.self_attn\.v_proj: a scale is zero"),
    (
        poke("blk.0.attn_v.weight", 0, b"\0\x7e"),
        r"v_proj: a scale is zero or not finite",
    ),
    (
        poke("blk.0.attn_v.weight", 0, b"\1\x3c"),
        r"v_proj: a scale in torch\.float16 is none that torch\.bf",
    ),
    (poke("blk.0.attn_v.weight", 2, b"\1\xc5"), r"v_proj: a minimum is not 0 to 15 times its scale"),
    (poke("blk.0.attn_v.weight", 2, b"\0\x7e"), r"v_proj: a minimum is not 0 to 15 times its scale"),
    (
        poke("blk.0.attn_v.weight", 0, b"\0\x3c\0\xcc"),  # 1 and -16
        r"v_proj: a minimum is not 0 to 15 times its scale",
    ),
    (replaced(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"), r"tensor blk\.0\.attn_z\.weight is none of"),
    (poke("output_norm.weight", 0, b"\1\0\0\0"), r"model\.norm\.weight holds values beyond the bfloat16"),
    (say(num_attention_heads=2), rf"tensor {Q}\.weight has 64 rows; config\.json asks for 32"),
    (say(architectures=["GemmaForCausalLM"]), "not for GemmaForCausalLM"),
    (say(quant_method="gptq"), "quantized by 'gptq'; this reader serves gguf"),
    (say(meta={"scale_dtype": "int4"}), "scales in 'int4'"),
]


def read_all(path):
    checkpoint = gguf.load(path)
    return dict(checkpoint.tensors), dict(checkpoint.plain)


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(whole, tmp_path, damage, message):
    path = shutil.copytree(whole, tmp_path / "m")
    damage(path)
    with pytest.raises(ValueError, match=message):
        read_all(path)
