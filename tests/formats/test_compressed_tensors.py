"""Law (f): load(save(x)) == x; golden bytes; the library and transformers decode the same weights; damage is named."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, embedded, recipe, scattered, scheme, tiny
from tiny_grids import MIXED, RECIPES

from qat.formats import compressed_tensors as ct
from qat.formats.base import file_bytes, linear_names, write_directory
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme, is_input_scale
from qat.ptq.rtn import rtn as rtn_method

SCHEMES = [
    Scheme(IntGrid(bits), granularity, symmetric)
    for bits in range(2, 9)
    for granularity in (PerGroup(32), PerChannel(), PerTensor())
    for symmetric in ((True,) if isinstance(granularity, PerTensor) else (True, False))
]
Q = "model.layers.0.self_attn.q_proj"
FORMATS = {
    **dict.fromkeys((name for name in RECIPES if name.startswith("w8a8")), "int-quantized"),
    **dict.fromkeys(("w4a8", "w4a8_fp8", "w2_signed"), "pack-quantized"),
    **dict.fromkeys(("fp8", "fp8_static", "fp8_tensor"), "float-quantized"),
    "fp8_weights": "naive-quantized",
    **dict.fromkeys(("mxfp8", "mxfp8a16"), "mxfp8-quantized"),
    **dict.fromkeys(("mxfp4", "mxfp4a16", "mxfp4a8"), "mxfp4-pack-quantized"),
    **dict.fromkeys(("nvfp4", "nvfp4a16"), "nvfp4-pack-quantized"),
}
STORED_INPUTS = ("w8a8_static", "w8a8_static_sym", "fp8_static", "fp8_tensor", "nvfp4")


def save(path, rules, **kwargs):
    model = tiny(**kwargs)
    changes = rtn_method(model, rules, [], observer=MinMax())
    ct.save(path, model, rules, changes.tensors, changes.folded, byte_tokenizer())
    return changes


def same(a, b):
    parts = [(getattr(a, p), getattr(b, p)) for p in ("codes", "scale", "zero_point", "global_scale", "g_idx")]
    return a.scheme == b.scheme and all(x is y is None or equal(x, y) for x, y in parts)


def equal(x, y):
    """Bit for bit: torch compares no powers of two."""
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("s", SCHEMES, ids=str)
def test_law_f_round_trip_and_the_library_decodes_the_same(tmp_path, s):
    from qat.evaluation.foreign import library

    rules = Recipe({"linears": Rule(".*_proj", s), "head": Rule("lm_head", None)})
    changes = save(tmp_path / "m", rules)
    checkpoint = ct.load(tmp_path / "m")
    assert checkpoint.tensors.keys() == changes.tensors.keys()
    for name, tensor in changes.tensors.items():
        assert same(checkpoint.tensors[name], tensor)
        assert checkpoint.recipe.rule_for(name)[1].weight == s
    assert library(checkpoint)["max_abs_diff"] == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_law_f_round_trip_with_a_g_idx(tmp_path, bits, symmetric):
    """One module of a scheme has a g_idx, so all of that scheme do; of another scheme none does."""
    from qat.evaluation.foreign import library

    grouped = scheme(bits, symmetric=symmetric)
    rules = Recipe({"all": Rule(".*_proj", grouped), "o": Rule(".*o_proj", Scheme(IntGrid(8), PerChannel()))})
    model = tiny()
    changes = rtn_method(model, rules, [], observer=MinMax())
    changes.tensors = {n: scattered(t) if "mlp" in n else t for n, t in changes.tensors.items()}
    ct.save(tmp_path / "m", model, rules, changes.tensors, {}, None)
    checkpoint = ct.load(tmp_path / "m")
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in changes.tensors.items())
    assert library(checkpoint)["max_abs_diff"] == 0
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    assert {g["weights"]["strategy"]: g["weights"]["actorder"] for g in groups} == {"group": "group", "channel": None}
    stored = {name.rpartition(".")[0] for name in checkpoint.files if name.endswith("weight_g_idx")}
    assert stored == {name for name in changes.tensors if "o_proj" not in name}
    raw = load_file(tmp_path / "m" / "model.safetensors")
    assert raw[f"{Q}.weight_g_idx"].tolist() == [0] * 32 + [1] * 32
    assert torch.equal(raw["model.layers.0.mlp.up_proj.weight_g_idx"], scattered(changes.tensors[Q]).g_idx)


def test_a_g_idx_is_of_packed_integers_alone(tmp_path):
    rules = RECIPES["w4a8"]
    changes = rtn_method(tiny(), rules, [], observer=MinMax())
    tensors = {name: scattered(tensor) for name, tensor in changes.tensors.items()}
    ct.save(tmp_path / "m", tiny(), rules, tensors, {}, None)
    assert all(same(ct.load(tmp_path / "m").tensors[name], tensor) for name, tensor in tensors.items())
    eight = Recipe({"all": replace(next(iter(rules.rules.values())), weight=scheme(8))})
    tensors = {n: scattered(t) for n, t in rtn_method(tiny(), eight, [], observer=MinMax()).tensors.items()}
    with pytest.raises(ValueError, match=r"^model\.\S+: compressed-tensors has a g_idx in pack-quantized alone"):
        ct.save(tmp_path / "n", tiny(), eight, tensors, {}, None)


def exact(checkpoint, rules, changes):
    """Codes, scales, schemes of weights and of inputs, and the scales of these."""
    assert checkpoint.tensors.keys() == changes.tensors.keys()
    for name, tensor in changes.tensors.items():
        assert same(checkpoint.tensors[name], tensor)
        found, rule = checkpoint.recipe.rule_for(name)[1], rules.rule_for(name)[1]
        assert (found.weight, found.input) == (rule.weight, rule.input)
    inputs = {name: value for name, value in changes.folded.items() if is_input_scale(name)}
    assert {name for name in checkpoint.plain if is_input_scale(name)} == set(inputs)
    assert all(equal(checkpoint.plain[name], value) for name, value in inputs.items())
    return inputs


@pytest.mark.parametrize("name", RECIPES)
def test_law_f_holds_with_quantized_inputs_and_on_every_grid(tmp_path, name):
    """And by default transformers loads each of them, with the same weights and the same scales of inputs."""
    from tiny_export import quantized

    from qat.evaluation.foreign import library, transformers

    rules, model = RECIPES[name], tiny(1)
    changes = quantized(rules, model)
    ct.save(tmp_path / "m", model, rules, changes.tensors, changes.folded, byte_tokenizer())
    checkpoint = ct.load(tmp_path / "m")
    inputs = exact(checkpoint, rules, changes)
    assert bool(inputs) is (name in STORED_INPUTS)
    assert checkpoint.config["quantization_config"]["format"] == FORMATS[name]
    assert library(checkpoint)["max_abs_diff"] == 0
    loaded = transformers(checkpoint, None, [])
    assert (loaded["max_abs_diff"], loaded["load_path"]) == (0, "AutoModelForCausalLM.from_pretrained")


def test_sub_formats_beside_each_other(tmp_path):
    from tiny_export import quantized

    from qat.evaluation.foreign import library, transformers

    model = tiny(1)
    changes = quantized(MIXED, model)
    ct.save(tmp_path / "m", model, MIXED, changes.tensors, changes.folded, byte_tokenizer())
    checkpoint = ct.load(tmp_path / "m")
    exact(checkpoint, MIXED, changes)
    said = checkpoint.config["quantization_config"]
    assert said["format"] == "mixed-precision"
    formats = [group["format"] for group in said["config_groups"].values()]
    assert sorted(formats) == sorted({*FORMATS.values()} - {"naive-quantized", "mxfp4-pack-quantized"})
    assert library(checkpoint)["max_abs_diff"] == 0
    assert transformers(checkpoint, None, [])["max_abs_diff"] == 0


def test_how_a_dynamic_scale_follows_from_absmax_is_said_beside_the_groups(tmp_path):
    """By a key of our own, which the library and transformers pass over; without it, it is the library's."""
    save(tmp_path / "vllm", RECIPES["w8a8"])
    save(tmp_path / "ct", RECIPES["w8a8_ct"])
    said = {name: ct.load(tmp_path / name).config["quantization_config"] for name in ("vllm", "ct")}
    assert said["vllm"].pop("scale_conventions") == {"group_0": {"input_activations": "vllm"}}
    assert said["vllm"] == said["ct"]
    assert QuantizationConfig(**said["vllm"], scale_conventions={}) == QuantizationConfig(**said["ct"])


def test_an_input_that_was_calibrated_under_another_recipe_is_refused(tmp_path):
    from tiny_export import quantized

    model, rules = tiny(1), RECIPES["w8a8_static"]
    changes = quantized(rules, model)

    def refused(message, folded, rules=rules):
        with pytest.raises(ValueError, match=message):
            ct.save(tmp_path / "m", model, rules, changes.tensors, folded, None)

    refused(rf"{Q}: its input scheme is int8_tensor_asym, but {Q}\.input_\w+ is missing; calibrate", {})
    refused(rf"{Q}\.input_\w+ is stored", changes.folded, RECIPES["w8a8"])
    wide = {k: v.float() if k.endswith("input_scale") else v for k, v in changes.folded.items()}
    refused(r"input_scale in torch\.float32, but the storage dtype is torch\.bfloat16", wide)
    lost = changes.folded | {f"{Q}.input_scale": torch.tensor([float("nan")], dtype=torch.bfloat16)}
    refused(rf"{Q}\.input_scale: not finite", lost)
    refused(
        "stray.input_scale: a changed tensor that the model does not have", changes.folded | {"stray.input_scale": 1}
    )


def test_the_file_holds_what_arithmetic_says(tmp_path):
    """Codes, scales, the rest in two bytes, eight bytes for each shape, and a header."""
    save(tmp_path / "m", recipe(3))
    model = tiny()
    n = sum(m.weight.numel() for name, m in model.named_modules() if name.endswith("_proj"))
    rest = sum(p.numel() for p in model.parameters()) - n
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "m" / "model.safetensors").read_bytes()[:8], "little")
    assert size - header == n * (3 + 16 / 32) / 8 + 2 * rest + 14 * 16
    changes = rtn_method(model, recipe(3), [], observer=MinMax())
    assert file_bytes(ct.state(model, recipe(3), changes.tensors, {}, torch.bfloat16)) == size


def test_the_config_is_what_loaders_expect(tmp_path):
    save(tmp_path / "m", recipe())
    quantization = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["ignore"] == ["lm_head"]
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 32


def test_several_schemes_name_their_modules(tmp_path):
    from qat.evaluation.foreign import library, transformers

    rules = Recipe({"all": Rule(".*_proj", scheme(4)), "down": Rule(".*down_proj", Scheme(IntGrid(8), PerChannel()))})
    changes = save(tmp_path / "m", rules)
    checkpoint = ct.load(tmp_path / "m")
    assert all(same(checkpoint.tensors[n], t) for n, t in changes.tensors.items())
    assert library(checkpoint)["max_abs_diff"] == 0
    assert transformers(checkpoint, None, [])["max_abs_diff"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scale_of_another_dtype_is_kept(tmp_path, dtype):
    s = Scheme(IntGrid(4), PerGroup(32), scale_dtype=str(dtype).removeprefix("torch."))
    changes = save(tmp_path / "m", Recipe({"a": Rule(".*_proj", s)}))
    assert changes.tensors[Q].scale.dtype == dtype
    assert same(ct.load(tmp_path / "m").tensors[Q], changes.tensors[Q])


@pytest.mark.parametrize(
    ("weight", "input", "message"),
    [
        (Scheme(IntGrid(4), PerChannel(), dynamic=True), None, "a dynamic scale is never stored"),
        (Scheme(IntGrid(4), PerTensor(), symmetric=False), None, "use symmetric=true"),
        (Scheme(Codebook("nf4"), PerGroup(32)), None, "not the weight scheme nf4_g32; use format=none"),
        (
            scheme(),
            Scheme(IntGrid(8), PerTensor(), dynamic=True),
            "such as int8_tensor_dynamic; use granularity=PerToken",
        ),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_module(weight, input, message):
    with pytest.raises(ValueError, match=f"^{Q}: .*{message}"):
        ct.check_scheme(Q, weight, input)


def test_an_embedding_is_refused_by_name_and_fix(tmp_path):
    message = (
        "^model.embed_tokens: transformers does not load a packed embedding .* Use format=none, or add a later rule"
    )
    with pytest.raises(ValueError, match=message):
        ct.check_scheme("model.embed_tokens", scheme(8), None, "Embedding")
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "m", embedded())
    assert not (tmp_path / "m").exists()


def written(path, rules, tied, targets=None):
    """A checkpoint with a packed embedding, as other tools write it."""
    model = tiny(1, tied=tied)
    tensors = rtn_method(model, rules, [], observer=MinMax()).tensors
    config = ct.quantization_config(rules, tensors, linear_names(model))
    for old, new in (targets or {}).items():
        next(g for g in config["config_groups"].values() if old in g["targets"])["targets"] = new
    write_directory(path, model, None, ct.state(model, rules, tensors, {}, torch.bfloat16), config, torch.bfloat16)
    return tensors


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_embedding_is_read_and_the_library_decodes_the_same(tmp_path, tied, by_class):
    from qat.evaluation.foreign import library

    targets = {"model.embed_tokens": ["Embedding"], Q: ["Linear"]} if by_class else None
    tensors = written(tmp_path / "m", embedded(), tied, targets)
    checkpoint = ct.load(tmp_path / "m")
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(same(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())
    assert ("lm_head.weight" in checkpoint.plain) is not tied
    if not by_class:  # our check of the library finds a module's group by its name
        assert library(checkpoint)["max_abs_diff"] == 0


def test_transformers_still_fails_on_a_packed_embedding(tmp_path):
    """Why none is written: by default it fails; asked to dequantize, it has one scheme for the whole file. Once this
    test fails, embeddings can be exported."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    one = {"Linear": ["Linear", "Embedding"]}
    alike = written(tmp_path / "alike", embedded(scheme(4)), True, one)
    written(tmp_path / "mixed", embedded(), True)
    for name in ("alike", "mixed"):
        with pytest.raises((AttributeError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / name)
    asked = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        with pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", **asked)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "alike", **asked)
    table = alike["model.embed_tokens"].dequantize(torch.bfloat16)
    assert torch.equal(model.lm_head.weight, table)


def test_codes_from_another_recipe_or_dtype_are_refused(tmp_path):
    model, changes = tiny(), rtn_method(tiny(), recipe(4), [], observer=MinMax())
    with pytest.raises(ValueError, match="quantized as int4_g32_signed, but the recipe says int3_g32_signed"):
        ct.save(tmp_path / "m", model, recipe(3), changes.tensors, {}, None)
    with pytest.raises(ValueError, match=r"scale in torch\.bfloat16, but the storage dtype is torch\.float16"):
        ct.save(tmp_path / "m", model, recipe(4), changes.tensors, {}, None, torch.float16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("ct") / "m"
    save(path, recipe(4, symmetric=False))
    return path


def tampered(change):
    def apply(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


def reconfigured(**changes):
    def apply(path):
        config = json.loads((path / "config.json").read_text())
        weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
        for key, value in changes.items():
            (weights if key in weights else config["quantization_config"])[key] = value
        (path / "config.json").write_text(json.dumps(config))

    return apply


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def put(name, value):
    return tampered(lambda t: t.__setitem__(name, value(t.get(name))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors: truncated or not a safetensors file"),
        (tampered(lambda t: t.pop(f"{Q}.weight_scale")), f"tensor {Q}.weight_scale is missing"),
        (put(f"{Q}.weight", lambda t: torch.ones(64, 64)), f"tensor {Q}.weight lies beside the packed weight of {Q}"),
        (tampered(lambda t: t.pop(f"{Q}.weight_zero_point")), f"tensor {Q}.weight_zero_point is missing"),
        (put(f"{Q}.weight_packed", lambda t: t[:, :-1].contiguous()), rf"model\.safetensors: {Q}\.weight_packed"),
        (put(f"{Q}.weight_packed", lambda t: t.to(torch.int64)), rf"{Q}\.weight_packed: torch\.int64"),
        (put(f"{Q}.weight_scale", lambda t: t * 0), rf"{Q}\.weight_scale: a scale is zero"),
        (put(f"{Q}.weight_scale", lambda t: t / 0), rf"{Q}\.weight_scale: a scale is zero or not finite"),
        (put(f"{Q}.weight_scale", lambda t: t[:, :1].contiguous()), rf"{Q}\.weight_scale: .* expected \(64, 2\)"),
        (put(f"{Q}.weight_shape", lambda t: t + 1), rf"{Q}\.weight_packed"),
        (put(f"{Q}.weight_zero_point", lambda t: t[:-1].contiguous()), rf"{Q}\.weight_zero_point"),
        (
            put("stray.weight_scale", lambda t: torch.ones(1)),
            r"tensor stray\.weight_scale belongs to no module that is quantized so",
        ),
        (
            reconfigured(quant_method="gptq"),
            "quantized by 'gptq' pack-quantized; this reader serves compressed-tensors",
        ),
        (
            put(f"{Q}.input_scale", lambda t: torch.ones(1)),
            r"tensor .*input_scale belongs to no module that is quantized",
        ),
        (reconfigured(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized', but group_0 is pack-quantized"),
        (reconfigured(format="dense"), "quantized by 'compressed-tensors' dense; this reader serves"),
        (reconfigured(num_bits=3), r"weight_packed: .* 3-bit"),
        (reconfigured(num_bits=9), "bits=9"),
        (reconfigured(type="float"), "group_0: weights: symmetric=false with grid e2m1"),
        (reconfigured(strategy="block"), "strategy 'block'; expected group, tensor_group, channel"),
        (reconfigured(actorder="group"), r"tensor .*weight_g_idx is missing"),
        (reconfigured(actorder="up"), "group_0: actorder 'up' in 'pack-quantized'; this reader serves 'group'"),
        (put(f"{Q}.weight_g_idx", lambda t: torch.arange(64)), r"tensor .*weight_g_idx belongs to no module"),
        (reconfigured(config_groups={}), "no config group speaks of the packed module"),
    ],
)
def test_damage_is_named(whole, tmp_path, damage, message):
    path = shutil.copytree(whole, tmp_path / "m")
    damage(path)
    with pytest.raises(ValueError, match=message):
        dict(ct.load(path).tensors)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    from tiny_export import quantized

    path, model = tmp_path_factory.mktemp("ct") / "m", tiny(1)
    changes = quantized(RECIPES["fp8_static"], model)
    ct.save(path, model, RECIPES["fp8_static"], changes.tensors, changes.folded, byte_tokenizer())
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tampered(lambda t: t.pop(f"{Q}.weight_scale")), f"tensor {Q}.weight_scale is missing"),
        (tampered(lambda t: t.pop(f"{Q}.input_scale")), f"tensor {Q}.input_scale is missing"),
        (put(f"{Q}.input_scale", lambda t: t * 0), rf"model\.safetensors: {Q}\.input_scale: a scale is zero"),
        (put(f"{Q}.input_scale", lambda t: t.repeat(2)), rf"{Q}\.input_scale: .* expected torch\.bfloat16 \(1,\)"),
        (put(f"{Q}.weight", lambda t: t.view(torch.int8)), rf"{Q}: weights in torch\.int8"),
        (put(f"{Q}.weight", lambda t: t.view(torch.uint8).fill_(255).view(t.dtype)), rf"{Q}\.weight: holds NaN"),
    ],
)
def test_damage_of_inputs_and_floats_is_named(floats, tmp_path, damage, message):
    path = shutil.copytree(floats, tmp_path / "m")
    damage(path)

    def read():
        checkpoint = ct.load(path)
        return dict(checkpoint.tensors), dict(checkpoint.plain)

    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.slow
def test_the_demo_model_round_trips(tmp_path, demo):
    from qat.models import hf

    model, tokenizer = hf.load(path=demo)
    for bits, megabytes in ((4, 113), (3, 100)):
        rules = Recipe({"linears": Rule(".*_proj", Scheme(IntGrid(bits), PerGroup(64)))})
        changes = rtn_method(model, rules, [], observer=MinMax())
        ct.save(tmp_path / str(bits), model, rules, changes.tensors, {}, tokenizer)
        size = (tmp_path / str(bits) / "model.safetensors").stat().st_size
        assert abs(size / 1e6 - megabytes) < 1
        checkpoint = ct.load(tmp_path / str(bits))
        assert all(same(checkpoint.tensors[n], t) for n, t in changes.tensors.items())


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config"])
def test_what_would_change_the_meaning_of_the_weights_is_refused(tmp_path, key):
    from tiny_export import export

    export(tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    config["quantization_config"][key] = {"format": "dense"}
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{key} is set"):
        ct.load(tmp_path / "ct")


def test_symmetric_is_true_or_false(tmp_path):
    from tiny_export import export

    export(tmp_path / "ct")
    file = tmp_path / "ct" / "config.json"
    file.write_text(file.read_text().replace('"symmetric": true', '"symmetric": "false"'))
    with pytest.raises(ValueError, match="symmetric 'false'; expected true or false"):
        ct.load(tmp_path / "ct")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_cache_is_restored(tmp_path, kind):
    changes = save(tmp_path / "m", recipe(kv=kind))
    checkpoint = ct.load(tmp_path / "m")
    assert checkpoint.recipe.kv == (None if kind is None else KINDS[kind])
    assert all(same(checkpoint.tensors[n], t) for n, t in changes.tensors.items())
    written = checkpoint.config["quantization_config"]["kv_cache_scheme"]
    if kind is not None:
        assert QuantizationArgs(**written).model_dump(exclude_unset=True) == written
        assert (written["strategy"], written["group_size"], written["dynamic"]) == ("group", 16, True)


@pytest.mark.parametrize(
    "written",
    [
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": True},
        {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16, "dynamic": True},
        {"num_bits": 6, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "dynamic": True},
        {},
        3,
        "int8",
    ],
    ids=str,
)
def test_caches_that_this_reader_does_not_serve(tmp_path, written):
    save(tmp_path / "m", recipe())
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["kv_cache_scheme"] = written
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: kv_cache_scheme .* this reader serves dynamic int8, int4, fp8"):
        ct.load(tmp_path / "m")


def test_a_cache_that_the_format_cannot_say(tmp_path):
    static = Scheme(FloatGrid("e4m3"), PerTensor())
    with pytest.raises(ValueError, match=r"recipe\.kv: granularity=PerTensor"):
        save(tmp_path / "m", replace(recipe(), kv=static))
    assert not (tmp_path / "m").exists()
