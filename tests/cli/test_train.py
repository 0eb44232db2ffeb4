import json

import pytest

from qat.cli.main import main
from qat.formats import compressed_tensors

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def trained(finish):
    return finish("train")


def test_one_trained_arm_exported_and_verified(trained):
    summary = json.loads((trained.path / "summary.json").read_text())
    assert list(summary["arms"]) == ["fp", "qat"]
    assert summary["export"]["verified"]
    assert summary["recovered"] == {}
    assert trained.path.parent.name == "train"
    assert (trained.path / "export" / "compressed_tensors" / "model.safetensors").is_file()


def test_it_trains_what_the_whole_comparison_trains(trained, finished):
    mine, whole = (json.loads((run.path / "summary.json").read_text())["arms"]["qat"] for run in (trained, finished))
    assert mine["windows"] == whole["windows"]


def test_a_tied_pair_in_eight_bits(finish):
    """Certified, judged and counted once; a hidden size of 64 stores 16 bits of scale for 64 codes of a row."""
    run = finish("train", "recipe=w4a16_g64_embed8", "format=none")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["export"]["captured"] == {"modules": 9, "equal": 9, "dtype": "float32"}
    table, linears = 256 * 64, 64 * (64 + 32 + 32 + 64 + 3 * 128)
    bits = table * (8 + 16 / 64) + linears * (4 + 16 / 32)
    assert summary["arms"]["qat"]["bits_per_quantized_weight"] == pytest.approx(bits / (table + linears))
    norms = 3 * 64
    whole = (bits + 16 * norms) / (table + linears + norms)
    assert summary["arms"]["qat"]["bits_per_weight"] == pytest.approx(whole)
    assert "tied to model.embed_tokens, shares its codes" in run.out


def test_training_from_a_rotated_model_serves_what_it_trained(finish):
    """The embedding does not train, and is none of the model's: it was rotated."""
    run = finish("train", "init=rotate", "+method@init.method.then=gptq", "model.untie=true", "trainer.max_steps=1")
    assert json.loads((run.path / "summary.json").read_text())["export"]["verified"]
    checkpoint = compressed_tensors.load(run.path / "export" / "compressed_tensors")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(checkpoint.plain)


def test_cross_entropy_alone_needs_no_teacher_and_recovers_against_no_distilled_reference(finish):
    run = finish("train", "loss=ce", "trainer.max_steps=1")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["export"]["verified"]
    assert "recovered" not in summary  # it would be judged against a fine-tuned model, and there is none


def test_a_quantized_cache_is_trained_exported_verified_and_found_again(finish, capsys):
    run = finish("train", "kv=fp8", "trainer.max_steps=1")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["export"]["verified"]
    config = json.loads((run.path / "export" / "compressed_tensors" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    capsys.readouterr()
    assert main(["eval", f"runs={run.runs}", f"run={run.path}", "device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] == pytest.approx(summary["arms"]["qat"]["kl"], rel=1e-9)


def weight(grid: str, granularity: str = "PerGroup, group_size: 32", symmetric: bool = True, more: str = "") -> str:
    numerics = "_target_: qat.numerics"
    grid, kind = (f"{numerics}.grid.{grid}", f"{numerics}.granularity.{granularity}")
    return (
        f"{{{numerics}.scheme.Scheme, grid: {{{grid}}}, granularity: {{{kind}}}, symmetric: {str(symmetric).lower()}"
        f"{more}}}"
    )


INTEGERS = [weight(f"IntGrid, bits: {bits}") for bits in (2, 3, 5, 6, 7, 8)]
INT8, FP8, FP4 = "IntGrid, bits: 8", "FloatGrid, name: e4m3", "FloatGrid, name: e2m1"
NVFP4 = (FP4, "PerGroup, group_size: 16", True, ", scale_dtype: float8_e4m3fn")
MXFP4, MXFP8 = ((grid, "PerGroup, group_size: 32", True, ", scale_dtype: float8_e8m0fnu") for grid in (FP4, FP8))
TOKENS = weight(INT8, "PerToken", True, ", dynamic: true, convention: vllm")


def dynamic(grid: str, granularity: str, symmetric: bool = True, more: str = "") -> str:
    return weight(grid, granularity, symmetric, f"{more}, dynamic: true")


GRIDS = {  # schemes, one for each linear of the block, in turn; transformers reads one asymmetric scheme, and no other
    "symmetric": [*INTEGERS, weight("IntGrid, bits: 4", "PerChannel")],
    "three bits and a zero": [weight("IntGrid, bits: 3", symmetric=False)],
    "two bits and a zero": [weight("IntGrid, bits: 2", symmetric=False)],
    "codebooks": [weight(f"Codebook, name: {name}") for name in ("ternary", "seq2", "binary")],
    "inputs": [  # of some, beside the weights
        f"{weight(INT8, 'PerChannel')}, input: {TOKENS}",
        f"{weight(INT8, 'PerChannel')}, input: {weight(INT8, 'PerTensor', False)}",
        f"{weight('IntGrid, bits: 4')}, input: {TOKENS}",
        f"{weight(FP8, 'PerChannel')}, input: {weight(FP8, 'PerTensor')}",
        f"{weight(FP8, 'PerChannel')}, input: {dynamic(FP8, 'PerToken')}",
        weight(*NVFP4),
        f"{weight(*NVFP4)}, input: {dynamic(*NVFP4)}",
    ],
    "powers of two": [f"{weight(*MXFP8)}, input: {dynamic(*MXFP8)}", weight(*MXFP4), weight(*MXFP8)],
}
ESTIMATORS = ("lsq", "lsq", "efficientqat", "seq", "lsq", "clipped")
PACKED = {
    "symmetric": {*(f"int{bits}_g32" for bits in (2, 3, 5, 6, 7, 8)), "int4_channel"},
    "three bits and a zero": {"int3_g32_asym"},
    "two bits and a zero": {"int2_g32_asym"},
    "codebooks": {"int2_g32", "int3_g32"},  # as integers, one bit wider
    "inputs": {"int8_channel", "int4_g32", "e4m3_channel", "e2m1_g16_e4m3"},
    "powers of two": {"e4m3_g32_e8m0", "e2m1_g32_e8m0"},
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("grids", "estimator"), list(zip(GRIDS, ESTIMATORS, strict=True)))
def test_the_certificate_holds_on_every_grid_that_the_format_carries(grids, estimator, finish, tmp_path):
    """Beside each other in one model. Scales move far in two steps, so that codes are not those of the start."""
    schemes, lines = GRIDS[grids], ["_target_: qat.numerics.recipe.Recipe", "rules:"]
    for index, name in enumerate(LINEARS):
        scheme = schemes[index % len(schemes)]
        lines.append(f"  {name}: {{_target_: qat.numerics.recipe.Rule, match: '.*{name}', weight: {scheme}}}")
    file = tmp_path / "grids.yaml"
    file.write_text("\n".join(lines) + "\n")
    run = finish("train", f"recipe={file}", f"estimator={estimator}", "optim.scale_lr=0.2", "optim.warmup=0")
    export = json.loads((run.path / "summary.json").read_text())["export"]
    assert export["verified"]
    assert export["codes_equal"]
    assert export["weights_equal"]
    assert export["greedy_equal"]
    packed = compressed_tensors.load(run.path / "export" / "compressed_tensors").tensors
    assert {str(tensor.scheme) for tensor in packed.values()} == PACKED[grids]


def summary(run):
    return json.loads((run.path / "summary.json").read_text())


def test_lora_is_verified_and_its_weights_are_those_that_training_captured(finish):
    run = finish("train", "adapter=lora", "adapter.rank=2", "optim.lr=0.01")
    assert summary(run)["export"]["verified"]
    certificate = json.loads((run.path / "export" / "compressed_tensors" / "verify.json").read_text())
    assert certificate["checks"]["captured"] == {"modules": 7, "equal": 7, "dtype": "float32", "passed": True}
    matrices = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (128, 64), "up": (128, 64)}
    sizes = [*matrices.values(), (64, 128)]
    assert summary(run)["cost"]["trained_parameters"] == sum(2 * (o + i) + o * i // 32 for o, i in sizes)
    assert "adapter lora" in run.out
    assert main(["export", f"runs={run.runs}", f"out={run.runs / 'out'}"]) == 0  # from a checkpoint without the weights
    files = [path / "model.safetensors" for path in (run.path / "export" / "compressed_tensors", run.runs / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


QLORA = ("adapter=qlora", "adapter.rank=2", "adapter.group_size=32")


@pytest.fixture(scope="module")
def merged(finish):
    return finish("train", *QLORA, "format=none")


def test_qlora_merges_to_an_unquantized_arm(merged):
    found = summary(merged)
    assert found["arms"]["qat"]["bits_per_weight"] == found["arms"]["qat"]["bits_per_quantized_weight"] == 16
    assert found["arms"]["qat"]["bytes"] == found["arms"]["fp"]["bytes"]
    assert found["arms"]["qat"]["kl"] > 0
    assert found["export"]["path"] is None
    assert "not applicable" in found["export"]["captured"]


def test_a_method_quantizes_what_qlora_merged_and_the_export_is_verified(finish, finished):
    run = finish("train", *QLORA, "method@adapter.then=gptq")
    assert summary(run)["export"]["verified"]
    assert summary(run)["arms"]["qat"]["bits_per_quantized_weight"] == 4.5
    assert summary(run)["arms"]["qat"]["windows"] != summary(finished)["arms"]["gptq"]["windows"]  # of the model's own
    assert (run.path / "checkpoints" / "adapter_then").is_dir()


def test_the_method_quantizes_embeddings_too_where_the_recipe_says(finish):
    """QLoRA leaves them alone, so there is no merged one to replace."""
    run = finish("train", *QLORA, "method@adapter.then=rtn", "recipe=w4a16_g64_embed8", "format=none")
    assert summary(run)["arms"]["qat"]["bits_per_weight"] < summary(run)["arms"]["fp"]["bits_per_weight"] / 2


def test_without_a_tensor_to_pack_nothing_is_exported(merged, capsys):
    assert main(["export", f"runs={merged.runs}", f"out={merged.runs / 'out'}"]) == 1
    assert "nothing is quantized; train with +method@adapter.then=gptq" in capsys.readouterr().err
    assert not (merged.runs / "out").exists()
