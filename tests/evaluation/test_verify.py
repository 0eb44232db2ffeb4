"""The certificate holds where it should, and one changed bit anywhere breaks it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import PROMPTS, export
from tiny_grids import MIXED, PAIRS, RECIPES

from qat.engine.config import EngineConfig
from qat.engine.llm import LLM
from qat.evaluation import foreign, reference
from qat.evaluation.reference import KL_BOUND, LOGIT_BOUND
from qat.evaluation.verify import FAST_KL_BOUND, verify
from qat.formats import compressed_tensors, ct_args
from qat.nn.quantized_input import QuantizedInput
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

Q = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "ct"
    export(path)
    return path


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "ct")


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def flip(name, mask=1):
    def change(tensors):
        value = tensors[name].view({2: torch.int16, 4: torch.int32}[tensors[name].element_size()]).flatten()
        value[3] ^= mask

    return change


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, True), (4, False), (8, True), (2, False)])
def test_a_true_export_is_verified(tmp_path, bits, symmetric):
    export(tmp_path / "ct", bits, symmetric)
    certificate = verify(tmp_path / "ct")
    assert {k: c["passed"] for k, c in certificate["checks"].items() if not c["passed"]} == {}
    assert certificate["verified"]
    assert certificate["checks"]["engine"]["greedy_equal"] == 3
    assert ("transformers_fp32" in certificate["checks"]) == symmetric
    assert json.loads((tmp_path / "ct" / "verify.json").read_text())["verified"]


GRIDS = ("w8a8", "w8a8_static", "w4a8", "fp8", "fp8_static", "mxfp8", "nvfp4", "nvfp4a16", "mxfp4a16")
BLOCKS = ("mxfp8", "nvfp4", "nvfp4a16", "mxfp4a16", "mixed")  # which the library decodes in bf16 alone


@pytest.mark.parametrize("name", [*GRIDS, "mixed"])
def test_a_true_export_of_every_grid_and_input_is_verified(tmp_path, name):
    rules = MIXED if name == "mixed" else RECIPES[name]
    export(tmp_path / "ct", rules=rules, layers=1)
    certificate = verify(tmp_path / "ct")
    assert {k: c["passed"] for k, c in certificate["checks"].items() if not c["passed"] and k != "fast_path"} == {}
    assert certificate["verified"]
    engine = certificate["checks"]["engine"]
    inputs = any(rule.input is not None for rule in rules.rules.values())
    assert (engine["dtype"], engine["greedy_equal"]) == ("float64" if inputs else "float32", 3)
    assert engine["max_abs_logit_diff"] < (1e-6 if inputs else 1e-5) * engine["max_abs_logit"]
    assert ("transformers_fp32" in certificate["checks"]) is (name not in BLOCKS)
    if inputs and name not in BLOCKS:
        row = certificate["checks"]["transformers_fp32"]
        assert row["load_path"].endswith("its inputs rounded by us")
        alike = row["max_abs_logit_diff_own_inputs"] < 1e-5 * row["max_abs_logit"]
        assert name == "w8a8_static" or alike is name.startswith("fp8")  # a zero point moves ties; 127.5 is not 127


def test_what_transformers_cannot_load_is_said(tmp_path):
    """Once this fails, it can: `foreign.loads` may go."""
    zeros = Scheme(IntGrid(4), PerGroup(32), symmetric=False)
    alone = Recipe({"all": Rule(".*_proj", zeros, PAIRS["fp8_static"][1])})
    mixed = Recipe({"all": Rule(".*_proj", zeros), "down": Rule(".*down_proj", *PAIRS["w8a8"])})
    for rules, loaded in ((alone, True), (mixed, False)):
        export(tmp_path / str(loaded), rules=rules, layers=1)
        certificate = verify(tmp_path / str(loaded))
        assert certificate["verified"]
        assert ("transformers_default" in certificate["checks"]) is loaded
        assert [text.partition(":")[0] for text in certificate["unchecked"]] == ([] if loaded else ["transformers"])
    with pytest.raises(RuntimeError):
        foreign.transformers(compressed_tensors.load(tmp_path / "False"), None, [])


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "ct"
    export(path, rules=RECIPES["w8a8"], layers=1)
    return path


@pytest.mark.parametrize("wrong", ["none", "convention"])
def test_an_engine_that_rounds_its_inputs_otherwise_is_not_verified(eight, tmp_path, monkeypatch, wrong):
    shutil.copytree(eight, tmp_path / "ct")
    other = QuantizedInput(replace(PAIRS["w8a8"][1], convention="ct"))
    monkeypatch.setattr("qat.engine.weights.Weights._input", lambda *_: None if wrong == "none" else other)
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    assert [k for k, c in certificate["checks"].items() if not c["passed"] and k != "fast_path"] == ["engine"]


def test_the_key_of_the_convention_is_certified(eight, tmp_path):
    shutil.copytree(eight, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["quantization_config"].pop("scale_conventions")
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config))
    certificate = verify(tmp_path / "ct")
    assert certificate["checks"]["files"]["changed"] == ["config.json"]
    assert not certificate["checks"]["engine"]["passed"]


@pytest.mark.parametrize(
    ("name", "part", "named"),
    [
        ("fp8_static", "input_scale", "input_scale"),
        ("fp8_static", "weight", "codes"),
        ("w8a8_static", "input_zero_point", "input_zero_point"),
        ("nvfp4", "weight_global_scale", "global_scale"),
        ("nvfp4", "weight_scale", "scale"),
        ("nvfp4", "input_global_scale", "input_global_scale"),
        ("mxfp4a16", "weight_scale", "scale"),
    ],
)
def test_one_bit_of_any_part_is_found_and_named(tmp_path, name, part, named):
    export(tmp_path / "ct", rules=RECIPES[name], new_tokens=1)

    def change(tensors):
        tensors[f"{Q}.{part}"].view(torch.uint8).flatten()[0] ^= 1

    edit(tmp_path / "ct", change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q}\.{named} is not what verify.json certifies"):
        verify(tmp_path / "ct")


@pytest.mark.parametrize(
    ("format", "bits", "symmetric", "foreign"),
    [
        ("gptq", 4, True, set()),
        ("gptq", 3, False, set()),
        ("awq", 4, True, {"autoawq_converter"}),
        ("awq", 4, False, {"autoawq_converter"}),
        ("gguf", 4, True, {"gguf", "transformers_gguf"}),
        ("gguf", 8, True, {"gguf", "transformers_gguf"}),
    ],
)
def test_a_true_export_in_every_format_is_verified(tmp_path, format, bits, symmetric, foreign):
    export(tmp_path / "m", bits, symmetric, format=format)
    certificate = verify(tmp_path / "m")
    assert {k: c["passed"] for k, c in certificate["checks"].items() if not c["passed"]} == {}
    assert certificate["verified"]
    assert set(certificate["checks"]) == {"tensors", "files", "engine", "fast_path"} | foreign
    assert certificate["checks"]["engine"]["greedy_equal"] == 3
    assert bool(certificate["unchecked"]) is not bool(foreign)  # what nobody here decodes is said, not passed
    assert all("GPTQ's layout" in text for text in certificate["unchecked"])


@pytest.mark.parametrize("format", ["gptq", "compressed_tensors"])
def test_a_true_export_with_a_g_idx_is_verified_and_its_groups_are_bound(tmp_path, format):
    export(tmp_path / "m", 3, False, format=format, scatter=True)
    certificate = verify(tmp_path / "m")
    assert {k: c["passed"] for k, c in certificate["checks"].items() if not c["passed"]} == {}
    assert certificate["verified"]
    assert certificate["checks"]["engine"]["greedy_equal"] == 3
    foreign = {"compressed_tensors_in_order"} if format == "compressed_tensors" else set()
    assert set(certificate["checks"]) == {"tensors", "files", "engine", "fast_path"} | foreign
    (said,) = certificate["unchecked"]
    assert ("no library here" if format == "gptq" else "no actorder=group since 0.19") in said
    name = f"{Q}.{'g_idx' if format == 'gptq' else 'weight_g_idx'}"
    g_idx = load_file(tmp_path / "m" / "model.safetensors")[name]
    edit(tmp_path / "m", lambda tensors: tensors.update({name: g_idx.roll(1)}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q}\.g_idx is not what verify\.json certifies"):
        verify(tmp_path / "m")
    edit(tmp_path / "m", lambda tensors: tensors.update({name: g_idx.sort().values}))  # then it reads as none
    with pytest.raises(ValueError, match=rf"{Q}\.g_idx is missing, of which verify\.json speaks"):
        verify(tmp_path / "m")


def test_a_part_that_is_gone_is_missed(tmp_path):
    """Without its zero points a file may still read well, as the file of a symmetric scheme."""
    export(tmp_path / "m", symmetric=False)
    edit(tmp_path / "m", lambda t: [t.pop(name) for name in list(t) if name.endswith("weight_zero_point")])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["symmetric"] = True
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"zero_point is missing, of which verify\.json speaks"):
        LLM(tmp_path / "m", EngineConfig(kernel="reference", device="cpu"))


@pytest.mark.parametrize(
    ("format", "part", "named"),
    [
        ("gptq", "qweight", "codes"),
        ("gptq", "scales", "scale"),
        ("gptq", "qzeros", "zero_point"),
        ("awq", "qweight", "codes"),
        ("awq", "scales", "scale"),
        ("awq", "qzeros", "zero_point"),
    ],
)
def test_one_flipped_bit_in_every_format_is_found_and_named(tmp_path, format, part, named):
    export(tmp_path / "m", 4, False, format=format)
    # A scale's last bits are none that bf16 holds: a higher one is, and only the digest can tell.
    edit(tmp_path / "m", flip(f"{Q}.{part}", 1 << 6 if part == "scales" else 1))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q}\.{named} is not what verify\.json certifies"):
        verify(tmp_path / "m")


@pytest.mark.parametrize(
    ("offset", "named"), [(2, r"up_proj\.codes"), (0, r"up_proj\.scale"), (None, r"model\.norm\.weight")]
)
def test_one_flipped_bit_of_a_gguf_file_is_found_and_named(tmp_path, offset, named):
    from gguf import GGUFReader

    export(tmp_path / "m", format="gguf")
    file = tmp_path / "m" / "model.gguf"
    name = "blk.1.ffn_up.weight" if offset is not None else "output_norm.weight"
    at = next(t.data_offset for t in GGUFReader(file).tensors if t.name == name)
    content = bytearray(file.read_bytes())
    content[at + {None: 2, 0: 0, 2: 2}[offset]] ^= 8 if offset == 0 else 1  # bits that bf16 holds
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.gguf: \S*{named} is not what verify\.json certifies"):
        verify(tmp_path / "m")


def test_what_a_gguf_file_says_beside_its_tensors_is_bound_too(tmp_path):
    """llama.cpp knows no other config than this."""
    export(tmp_path / "m", format="gguf")
    file = tmp_path / "m" / "model.gguf"
    content = file.read_bytes()
    assert content.count(b"llama.context_length") == 1
    file.write_bytes(content.replace(b"llama.context_length", b"llama.context_lengtX"))
    certificate = verify(tmp_path / "m")
    assert certificate["checks"]["files"]["changed"] == ["model.gguf"]
    assert not certificate["verified"]


def test_quantize_config_is_bound_too(tmp_path):
    export(tmp_path / "m", format="gptq")
    assert verify(tmp_path / "m")["verified"]
    (tmp_path / "m" / "quantize_config.json").write_text("{}")
    certificate = verify(tmp_path / "m")
    assert certificate["checks"]["files"]["changed"] == ["quantize_config.json"]
    assert not certificate["verified"]


def test_a_plain_checkpoint_has_nothing_to_verify(tmp_path):
    from tiny import tiny

    tiny().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="nothing in it is quantized"):
        verify(tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_export_with_a_quantized_cache_is_verified(tmp_path, kind):
    export(tmp_path / "ct", kv=kind)
    certificate = verify(tmp_path / "ct")
    assert certificate["verified"]
    engine = certificate["checks"]["engine"]
    assert (engine["kv"], engine["dtype"], engine["greedy_equal"]) == (kind, "float64", 3)
    assert engine["max_abs_logit_diff"] < 1e-6 * engine["max_abs_logit"]
    assert "its cache replaced by ours" in certificate["checks"]["transformers_fp32"]["load_path"]


def test_an_engine_with_another_cache_is_not_verified(tmp_path, monkeypatch):
    from qat.engine import loader

    export(tmp_path / "ct", kv="int8")
    for kind in (None, "int4", "fp8"):
        monkeypatch.setattr(loader, "cache_kind", lambda *_, kind=kind: kind)
        certificate = verify(tmp_path / "ct")
        assert not certificate["verified"]
        assert not certificate["checks"]["engine"]["passed"]


@pytest.mark.parametrize("written", [None, "int4"])
def test_another_cache_in_the_config_is_found(tmp_path, written):
    export(tmp_path / "ct", kv="int8")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    scheme = None if written is None else ct_args.kv_args(KINDS[written], 16)
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config))
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    assert certificate["checks"]["files"]["changed"] == ["config.json"]
    assert not certificate["checks"]["engine"]["passed"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (flip(f"{Q}.weight_packed"), f"{Q}.codes"),
        (flip(f"{Q}.weight_scale"), f"{Q}.scale"),
        (flip("model.norm.weight"), "model.norm.weight"),
        (flip("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    ],
)
def test_one_flipped_bit_is_found_and_named(copy, change, named):
    edit(copy, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {named} is not what verify.json certifies"):
        verify(copy)


def test_one_bit_of_a_zero_point_is_found_and_named(tmp_path):
    export(tmp_path / "ct", 4, False)
    edit(tmp_path / "ct", flip(f"{Q}.weight_zero_point"))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {Q}.zero_point is not what verify.json certifies"):
        verify(tmp_path / "ct")


def test_a_wrong_reference_is_found(copy):
    reference = copy / "verify" / "reference.safetensors"
    parts = load_file(reference)
    parts["0.logits"][0, 0] += 1
    save_file(parts, reference)
    with pytest.raises(ValueError, match="not the reference that"):
        verify(copy)


def test_a_missing_tensor_is_found(copy):
    certificate = json.loads((copy / "verify.json").read_text())
    certificate["sha256"]["model.extra.weight"] = "0"
    (copy / "verify.json").write_text(json.dumps(certificate))
    assert not verify(copy)["verified"]
    assert verify(copy)["checks"]["tensors"]["missing"] == ["model.extra.weight"]


@pytest.mark.parametrize("what", ["codes", "norm"])
def test_an_export_of_other_weights_fails_though_its_own_digests_agree(tmp_path, monkeypatch, what):
    """Digests made from the file would agree with it. The reference logits come from before the file."""
    from qat.evaluation import verify as module

    issue = module.issue

    def forged(path, tensors, unquantized, sequences, facts):
        edit(path, flip(f"{Q}.weight_packed", 7) if what == "codes" else flip("model.norm.weight", 64))

        checkpoint = compressed_tensors.load(path)
        issue(path, dict(checkpoint.tensors), dict(checkpoint.plain), sequences, facts)

    monkeypatch.setattr("tiny_export.issue", forged)
    export(tmp_path / "ct")
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    assert not certificate["checks"]["engine"]["passed"]
    assert certificate["checks"]["tensors"]["passed"]


def test_greedy_tokens_must_be_equal(copy):
    """A reference whose generated tokens are others, with digests that agree, is not reproduced."""
    from qat.evaluation import reference
    from qat.evaluation.verify import reference_digests

    sequences = reference.load(copy)
    sequences[1].ids[10] = (sequences[1].ids[10] + 1) % 256
    reference.save(copy, sequences)
    certificate = json.loads((copy / "verify.json").read_text())
    (copy / "verify.json").write_text(json.dumps(certificate | {"reference": reference_digests(sequences)}))
    certificate = verify(copy)
    assert not certificate["verified"]
    assert certificate["checks"]["engine"]["greedy_equal"] == 2


def test_a_token_that_the_engine_chooses_otherwise_is_enough(copy, monkeypatch):
    """All else agrees: the same file, the same logits."""
    generate = LLM.generate

    def other(self, *args, **kwargs):
        outputs = generate(self, *args, **kwargs)
        return [replace(out, token_ids=[(out.token_ids[0] + 1) % 256, *out.token_ids[1:]]) for out in outputs]

    monkeypatch.setattr(LLM, "generate", other)
    certificate = verify(copy)
    engine = certificate["checks"]["engine"]
    assert reference.close(engine)
    assert engine["greedy_equal"] == 0
    assert [name for name, check in certificate["checks"].items() if not check["passed"]] == ["engine"]
    assert not certificate["verified"]


def test_a_bare_checkpoint_says_what_could_not_be_checked(tmp_path):
    export(tmp_path / "ct", certified=False)
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    assert len(certificate["unchecked"]) == 3
    assert certificate["checks"]["compressed_tensors"]["passed"]
    assert json.loads((tmp_path / "ct" / "verify.json").read_text())["verified"] is False


def test_captured_weights_must_all_be_equal(copy):
    certificate = json.loads((copy / "verify.json").read_text())
    for captured, passed in (
        ({"modules": 14, "equal": 14, "dtype": "float32"}, True),
        ({"modules": 14, "equal": 13}, False),
        ({"modules": 15, "equal": 14}, False),  # one more was trained, such as a tied head, with other weights
        ({"modules": 0, "equal": 0}, False),
        ({"modules": 1, "equal": 1}, False),  # the file has 14
    ):
        (copy / "verify.json").write_text(json.dumps(certificate | {"captured": captured}))
        assert verify(copy)["verified"] is passed


@pytest.mark.parametrize(("prompts", "tokens"), [(1, 32), (2, 32), (3, 31), (3, 1)])
def test_too_few_prompts_or_tokens_prove_nothing(tmp_path, monkeypatch, prompts, tokens):
    monkeypatch.setattr("tiny_export.PROMPTS", PROMPTS[:prompts])
    export(tmp_path / "ct", new_tokens=tokens)
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    engine = certificate["checks"]["engine"]
    assert (engine["greedy_equal"], engine["tokens"]) == (prompts, tokens)  # equal, but not enough


@pytest.mark.parametrize("key", ["max_abs_logit_diff", "max_kl", "max_abs_logit"])
def test_logits_of_transformers_in_fp32_are_held_to_the_bounds(copy, monkeypatch, key):
    logits = foreign.logits

    def off(*args):
        found = logits(*args)
        bounds = {
            "max_abs_logit_diff": LOGIT_BOUND * found["max_abs_logit"],
            "max_kl": KL_BOUND,
            "max_abs_logit": torch.inf,
        }
        return found | {key: 1.1 * bounds[key]}

    monkeypatch.setattr(foreign, "logits", off)
    certificate = verify(copy)
    assert {n for n, c in certificate["checks"].items() if not c["passed"]} == {"transformers_fp32"}
    assert not certificate["verified"]


def nudge(value):
    """Flips the last bit of the smallest value that is not zero: a difference below any sensible tolerance."""
    flat = value.data.view(-1)
    at = torch.where(flat == 0, torch.inf, flat.abs().float()).argmin()
    before = float(flat[at])
    flat.view({2: torch.int16, 4: torch.int32}[value.element_size()])[at] ^= 1
    assert 0 < abs(float(flat[at]) - before) < 1e-3


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_one_bit_that_transformers_reads_differently_is_enough(copy, monkeypatch, dtype):
    load = foreign.load_quantized

    def off(path, wanted, **kwargs):
        model = load(path, wanted, **kwargs)
        if wanted is dtype:
            nudge(model.model.embed_tokens.weight)
        return model

    monkeypatch.setattr(foreign, "load_quantized", off)
    certificate = verify(copy)
    failed = {n: c for n, c in certificate["checks"].items() if not c["passed"]}
    assert set(failed) == {"transformers_default" if dtype is None else "transformers_fp32"}
    assert not certificate["verified"]


def test_one_bit_that_the_library_reads_differently_is_enough(copy, monkeypatch):
    compressor = foreign.BaseCompressor.get_value_from_registry(ct_args.PACKED)
    decompress, calls = compressor.decompress, []

    def off(parts, scheme):
        out = decompress(parts, scheme)
        calls.append(1)
        if len(calls) == 5:
            nudge(out["weight"])
        return out

    monkeypatch.setattr(foreign, "transformers", lambda *args: {"max_abs_diff": 0})
    monkeypatch.setattr(compressor, "decompress", off)
    certificate = verify(copy)
    assert {n for n, c in certificate["checks"].items() if not c["passed"]} == {"compressed_tensors"}
    assert not certificate["verified"]


def test_generated_tokens_are_scored_one_at_a_time_as_when_decoding(copy, monkeypatch):
    score, prefills = LLM.score, []

    def spy(llm, texts, prefill=None):
        prefills.append((list(map(len, texts)), prefill))
        return score(llm, texts, prefill)

    monkeypatch.setattr(LLM, "score", spy)
    assert verify(copy)["verified"]
    assert prefills == [([len(p) + 31 for p in PROMPTS], [len(p) for p in PROMPTS])] * 2  # the engine, the fast path


def test_a_certificate_without_digests_proves_nothing(copy):
    certificate = json.loads((copy / "verify.json").read_text())
    del certificate["sha256"]
    (copy / "verify.json").write_text(json.dumps(certificate))
    found = verify(copy)
    assert all(check["passed"] for check in found["checks"].values())
    assert "tensors" not in found["checks"]
    assert not found["verified"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_other_files_must_be_those_that_were_certified(copy, name):
    text = (copy / name).read_text()
    (copy / name).write_text(text + "\n")
    certificate = verify(copy)
    assert certificate["checks"]["files"]["changed"] == [name]
    assert not certificate["verified"]


def test_a_file_that_loaders_would_read_may_not_come_later(copy):
    """In a folder neither: `additional_chat_templates/default.jinja` wins over the template of the export."""
    (copy / ".cache/huggingface").mkdir(parents=True)
    for name in ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/.gitignore"):
        (copy / name).write_text("# A model")
    assert verify(copy)["verified"]
    names = ["adapter_config.json", "additional_chat_templates/default.jinja", "custom_generate/generate.py"]
    names += ["flax_model.msgpack", "model.ONNX", "pytorch_model.bin", "serve/README.md", "serve/more.sh"]
    names += ["special_tokens_map.json", "vocab.bpe", "zz_model.safetensors"]
    (copy / "serve").mkdir(exist_ok=True)
    (copy / "additional_chat_templates").mkdir()
    (copy / "custom_generate").mkdir()
    for name in names:
        (copy / name).write_bytes(b"")
    (copy / "special_tokens_map.json").unlink()
    (copy / "special_tokens_map.json").symlink_to("nowhere")
    shutil.copyfile(copy / "model.safetensors", copy / "zz_model.safetensors")
    certificate = verify(copy)
    assert certificate["checks"]["files"]["added"] == names
    assert not certificate["verified"]


def test_a_check_that_breaks_off_takes_back_what_was_said_before(copy):
    assert verify(copy)["verified"]
    edit(copy, flip("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        verify(copy)
    assert not json.loads((copy / "verify.json").read_text())["verified"]


def test_logits_that_are_not_numbers_are_close_to_nothing(copy, monkeypatch):
    from qat.evaluation.reference import difference

    assert difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    score = LLM.score
    monkeypatch.setattr(LLM, "score", lambda *a: [torch.full_like(s, torch.nan) for s in score(*a)])
    compared = foreign.compared
    monkeypatch.setattr(foreign, "compared", lambda found, said: compared((one * torch.nan for one in found), said))
    checks = verify(copy)["checks"]
    assert not checks["engine"]["passed"]
    assert not checks["transformers_fp32"]["passed"]
    assert not checks["fast_path"]["passed"]


def test_the_fast_paths_divergence_has_a_bound_of_its_own(copy, monkeypatch):
    """Logits that are flatter everywhere flip nothing; one token that flips by far is little in the mean."""
    score, exact = LLM.score, [sequence.logits for sequence in reference.load(copy)]
    off = [one.clone() for one in exact]
    top = off[0][2].topk(2)
    off[0][2, top.indices[1]] = top.values[0] + 1e-3
    for scores, bound, flips in (([one * 0.5 for one in exact], FAST_KL_BOUND, 0), (off, 1e9, 1)):

        def said(llm, texts, prefill, scores=scores):
            return score(llm, texts, prefill) if llm.config.kernel == "reference" else scores

        monkeypatch.setattr(LLM, "score", said)
        monkeypatch.setattr("qat.evaluation.verify.FAST_KL_BOUND", bound)
        fast = verify(copy)["checks"]["fast_path"]
        assert len(fast["flips"]) == flips
        assert (fast["kl"] > fast["bound"]) is not bool(flips)
        assert not fast["passed"]


def test_a_certificate_without_its_reference_is_not_that_of_the_reference(copy):
    certificate = json.loads((copy / "verify.json").read_text())
    del certificate["reference"]
    (copy / "verify.json").write_text(json.dumps(certificate))
    with pytest.raises(ValueError, match="not the reference"):
        verify(copy)


def test_a_flip_that_is_no_near_tie_fails_the_fast_path(copy, monkeypatch):
    """Noise is measured where nothing flipped: one position that is far off cannot excuse itself."""
    score = LLM.score

    def off(llm, texts, prefill):
        found = score(llm, texts, prefill)
        if llm.config.kernel != "reference":
            found[0][2] = -found[0][2]
        return found

    assert verify(copy)["checks"]["fast_path"]["passed"]
    monkeypatch.setattr(LLM, "score", off)
    certificate = verify(copy)
    assert certificate["verified"], "the fast path is a measurement"
    assert {"prompt": 0, "position": 2} in [
        {key: flip[key] for key in ("prompt", "position")} for flip in certificate["checks"]["fast_path"]["flips"]
    ]
    assert not certificate["checks"]["fast_path"]["passed"]


@pytest.mark.parametrize(
    "change", [{"files": None}, {"files": []}, {"captured": {}}, {"captured": {"equal": "a"}}, {"captured": None}]
)
def test_a_certificate_that_says_nothing_proves_nothing(copy, change):
    certificate = json.loads((copy / "verify.json").read_text())
    (copy / "verify.json").write_text(json.dumps(certificate | change | {"verified": True}))
    assert not verify(copy)["verified"]
    assert not json.loads((copy / "verify.json").read_text())["verified"]
