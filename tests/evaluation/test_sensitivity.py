import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.evaluation.divergence import evaluate
from qat.evaluation.sensitivity import Replay, Unit, divided, measure, swapped, units
from qat.models.llama import LLAMA
from qat.nn.observers.minmax import MinMax
from qat.numerics.recipe import Recipe, Rule
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply
from qat.surgery.match import match

BLOCKS = "model.layers"


@pytest.fixture(scope="module")
def model():
    return tiny(layers=3, tied=False)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(1, 256, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def replay(model, windows):
    return Replay(model, BLOCKS, windows.split(2))


def bits(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def schemes(unit, width=2):
    return dict.fromkeys(unit.modules, scheme(width))


@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_model_from_any_block_on_is_the_model(replay, start):
    assert replay.losses(start) == {"kl": [0.0] * 5, "nll": [0.0] * 5}


@pytest.mark.parametrize("by", ["linear", "stage", "block", "kind"])
def test_a_unit_loses_what_the_model_with_it_quantized_loses(model, windows, replay, by):
    """Against the whole model, run from its first token to its logits."""
    full = evaluate(model, windows)
    for unit in units(list(match(model, recipe(2)).quantized), LLAMA, by)[-3:]:
        rules = {name: Rule(name.replace(".", r"\."), scheme(2)) for name in unit.modules}
        tensors = rtn(model, Recipe(rules), [], observer=MinMax()).tensors
        assert set(tensors) == set(unit.modules)
        whole = evaluate(apply(model, tensors, {}), windows, model)
        found = measure(replay, unit, schemes(unit), MinMax(), torch.bfloat16)
        assert min(found["kl"]) > 1e-4
        assert torch.tensor(found["kl"]) * 11 == pytest.approx(whole.kl, rel=1e-4)
        assert torch.tensor(found["nll"]) * 11 == pytest.approx(whole.nll - full.nll, rel=1e-3, abs=1e-4)


def test_no_block_before_the_unit_is_run(replay, model):
    runs = []
    handles = [
        layer.self_attn.register_forward_hook(lambda m, *_: runs.append(m.layer_idx)) for layer in model.model.layers
    ]
    unit = Unit("down", ("model.layers.2.mlp.down_proj",), 2)
    measure(replay, unit, schemes(unit), MinMax(), torch.bfloat16)
    assert runs == [2, 2, 2]  # three batches
    [handle.remove() for handle in handles]


def test_the_model_is_afterwards_what_it_was(model, replay, monkeypatch):
    before, parameters = bits(model), dict(model.named_parameters())
    unit = Unit("block", tuple(name for name in match(model, recipe()).quantized if ".1." in name), 1)

    def fail(start):
        assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before["model.layers.1.mlp.up_proj.weight"])
        raise KeyboardInterrupt

    measure(replay, unit, schemes(unit), MinMax(), torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "losses", fail)
        with pytest.raises(KeyboardInterrupt):
            measure(replay, unit, schemes(unit), MinMax(), torch.bfloat16)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert replay.losses(0)["kl"] == [0.0] * 5


def test_tied_weights_are_swapped_wherever_they_stand():
    model = tiny(layers=1)
    weight = model.lm_head.weight
    tensor = rtn(tiny(layers=1, tied=False), Recipe({"a": Rule("lm_head", scheme())}), [], observer=MinMax()).tensors
    with swapped(model, tensor):
        assert model.lm_head.weight is model.model.embed_tokens.weight is not weight
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight


def test_a_module_outside_of_the_blocks_is_a_unit_that_changes_everything(model, replay):
    (head,) = [u for u in units(["lm_head", "model.layers.1.mlp.up_proj"], LLAMA, "block") if u.name == "lm_head"]
    assert head == Unit("lm_head", ("lm_head",), 0)
    assert min(measure(replay, head, schemes(head), MinMax(), torch.bfloat16)["kl"]) > 1e-4


def test_units():
    modules = [f"model.layers.{i}.{kind}" for i in range(11) for stage in LLAMA.stages for kind in stage]
    linears = units(modules, LLAMA, "linear")
    assert [unit.name for unit in linears] == modules
    assert linears[-1] == Unit("model.layers.10.mlp.down_proj", ("model.layers.10.mlp.down_proj",), 10)
    stages = units(modules, LLAMA, "stage")
    assert [unit.name for unit in stages[:4]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert stages[6].modules == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    blocks = units(modules, LLAMA, "block")
    assert [(unit.name, unit.start, len(unit.modules)) for unit in blocks[::10]] == [
        ("model.layers.0", 0, 7),
        ("model.layers.10", 10, 7),
    ]
    kinds = units([name for name in modules if ".0." not in name], LLAMA, "kind")
    assert [(unit.name, unit.start, len(unit.modules)) for unit in kinds[:2]] == [
        ("self_attn.q_proj", 1, 10),
        ("self_attn.k_proj", 1, 10),
    ]
    with pytest.raises(ValueError, match="unit='layer': one of linear, stage, block, kind"):
        units(modules, LLAMA, "layer")


def test_stages_of_several_widths_are_named():
    widths = {f"model.layers.{i}.self_attn.{kind}_proj": 3 for i in range(2) for kind in "qkvo"}
    assert divided(widths, LLAMA) == []
    assert divided(widths | {"model.layers.1.self_attn.v_proj": 4, "model.layers.0.self_attn.o_proj": 4}, LLAMA) == [
        "model.layers.1.self_attn.q_proj+k_proj+v_proj"
    ]


def test_logits_that_are_not_finite_name_the_unit(windows):
    model = tiny(layers=1)
    replay = Replay(model, BLOCKS, [windows])
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf  # after full precision was recorded
    unit = Unit("model.layers.0.mlp", ("model.layers.0.mlp.up_proj",), 0)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: the logits are not finite .* int2_g32"):
        measure(replay, unit, schemes(unit), MinMax(), torch.bfloat16)


def test_a_weight_that_is_not_finite_is_named(windows):
    model = tiny(layers=1)
    replay = Replay(model, BLOCKS, [windows])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    unit = Unit("x", ("model.layers.0.mlp.up_proj",), 0)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj"):
        measure(replay, unit, schemes(unit), MinMax(), torch.bfloat16)
