"""The walk hands every block what the model hands it, leaves the model alone, and resumes at any block."""

import copy

import pytest
import torch
from tiny import recipe, tiny
from transformers import Qwen3Config, Qwen3ForCausalLM, masking_utils

from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.qtensor import QuantizedTensor
from qat.ptq.awq import awq
from qat.ptq.gptq import gptq
from qat.ptq.rtn import rtn as nearest
from qat.surgery.changes import Changes
from qat.surgery.walk import copied, walk

BATCHES = list(torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(1)).split(2))


def seen_by_the_model(model):
    inputs = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, args, i=i: inputs.setdefault(i, []).append(args[0]))
    for batch in BATCHES:
        model.model(input_ids=batch, use_cache=False)
    return inputs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_unchanged_walk_sees_what_the_model_sees(family):
    model = tiny(layers=3)
    if family == "qwen3":
        config = Qwen3Config(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_window_layers=2, use_sliding_window=True, sliding_window=4,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config).eval()  # its last block attends differently: arguments differ by block
    visited = []

    def visit(block):
        visited.append([hidden.clone() for hidden in block.inputs])
        return Changes()

    walk(model, BATCHES, "model.layers", visit, True, recipe())
    for i, inputs in seen_by_the_model(copy.deepcopy(model)).items():
        assert all(torch.equal(a, b) for a, b in zip(visited[i], inputs, strict=True))


@pytest.mark.parametrize("propagate", [True, False])
def test_changes_reach_later_blocks_only_if_they_propagate(propagate):
    model, inputs = tiny(layers=2), []

    def visit(block):
        inputs.append(block.inputs[0].clone())
        with torch.no_grad():
            for parameter in block.module.parameters():
                parameter.mul_(0.5)
        return Changes()

    before = copy.deepcopy(model.state_dict())
    walk(model, BATCHES, "model.layers", visit, propagate, recipe())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    same = torch.equal(inputs[1], seen_by_the_model(model)[1][0])
    assert same is not propagate


@pytest.mark.parametrize("method", [gptq, awq])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_killed_walk_goes_on_with_the_same_codes(tmp_path, method, stop):
    model = tiny(layers=3)
    whole = method(model, recipe(3), BATCHES, observer=MinMax())

    class Killed(Exception):
        pass

    def kill(done, blocks):
        if done == stop:
            raise Killed

    with pytest.raises(Killed):
        method(model, recipe(3), BATCHES, observer=MinMax(), store=tmp_path, progress=kill)
    visited = []
    resumed = method(
        model, recipe(3), BATCHES, observer=MinMax(), store=tmp_path, progress=lambda i, n: visited.append(i)
    )
    assert visited == list(range(stop + 1, 4))
    assert whole.tensors.keys() == resumed.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.codes, resumed.tensors[name].codes)
        assert torch.equal(tensor.scale, resumed.tensors[name].scale)
    assert whole.folded.keys() == resumed.folded.keys()
    assert all(torch.equal(v, resumed.folded[k]) for k, v in whole.folded.items())
    assert [row["name"] for row in whole.layers] == [row["name"] for row in resumed.layers]


def test_zero_points_survive_a_resume(tmp_path):
    model, rules = tiny(), recipe(4, symmetric=False)

    def visit(block):
        name = f"{block.name}.mlp.up_proj"
        s = rules.rule_for(name)[1].weight
        codes, scale, zero = rtn(model.get_parameter(f"{name}.weight").detach(), s, torch.bfloat16)
        return Changes({name: QuantizedTensor(codes, scale, zero, s, tuple(codes.shape))})

    first = walk(model, BATCHES, "model.layers", visit, True, rules, tmp_path)
    again = walk(model, BATCHES, "model.layers", lambda block: 1 / 0, True, rules, tmp_path)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.zero_point, again.tensors[name].zero_point)


def test_only_the_streams_that_the_next_block_needs_are_kept(tmp_path):
    found = []

    def look(done, blocks):
        found.append(sorted(p.name for p in tmp_path.glob("stream-*")))

    walk(tiny(layers=4), BATCHES, "model.layers", lambda block: Changes(), True, recipe(), tmp_path, look)
    assert found == [[f"stream-{i:04}.safetensors"] for i in (1, 2, 3)] + [[]]
    assert len(list(tmp_path.glob("block-*"))) == 4


def halve(block):
    with torch.no_grad():
        for parameter in block.module.parameters():
            parameter.mul_(0.5)
    return Changes()


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize(("side", "later"), [("inputs", 0), ("outputs", 1)])
def test_the_full_precision_models_states_go_beside_inputs_of_the_changed_one(side, later, offload):
    model, seen = tiny(layers=3), []

    def visit(block):
        seen.append(([x.clone() for x in block.inputs], [x.clone() for x in block.full]))
        return halve(block)

    walk(model, BATCHES, "model.layers", visit, True, recipe(), full=side, offload=offload)
    full = seen_by_the_model(copy.deepcopy(model))
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.model.layers.parameters():
            parameter.mul_(0.5)
    changed = seen_by_the_model(halved)
    for i, (inputs, targets) in enumerate(seen):
        assert all(torch.equal(a, b) for a, b in zip(inputs, changed[i], strict=True))
        if i + later < len(seen):
            assert all(torch.equal(a, b) for a, b in zip(targets, full[i + later], strict=True))


def test_without_being_asked_there_are_no_targets():
    walk(tiny(), BATCHES, "model.layers", lambda b: Changes() if b.full == [] else 1 / 0, True, recipe())


@pytest.mark.parametrize("torn", [False, True])
def test_both_streams_survive_a_kill(tmp_path, monkeypatch, torn):
    """Torn: killed when the streams of the next block were written, and the block itself was not."""
    model, seen = tiny(layers=3), []

    def visit(block):
        seen.append((block.name, [x.clone() for x in [*block.inputs, *block.full]]))
        return halve(block)

    def go(store, progress=None):
        walk(model, BATCHES, "model.layers", visit, True, recipe(), store, progress, full="outputs")

    def kill(done, blocks):
        if done == 2:
            raise KeyboardInterrupt

    go(None)
    whole = dict(seen)
    seen.clear()
    save = Changes.save
    if torn:
        monkeypatch.setattr(Changes, "save", lambda self, file: kill(2, 3) if "0001" in file.name else save(self, file))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, kill)
    monkeypatch.setattr(Changes, "save", save)
    assert (tmp_path / "stream-0002.safetensors").exists()
    go(tmp_path)
    assert [name for name, _ in seen] == [f"model.layers.{i}" for i in ((0, 1, 1, 2) if torn else (0, 1, 2))]
    for name, streams in seen:
        assert all(torch.equal(a, b) for a, b in zip(streams, whole[name], strict=True)), name


@pytest.mark.parametrize("method", [gptq, awq, nearest])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_a_device_of_its_own_a_walk_finds_the_same_and_hands_it_back(method, device):
    """On a GPU sums have another order, which some weight at a boundary notices, and then the stages behind it."""
    model = tiny(layers=3)
    before = copy.deepcopy(model.state_dict())
    here = method(model, recipe(3), BATCHES, observer=MinMax())
    there = method(model, recipe(3), BATCHES, observer=MinMax(), device=device)
    assert here.tensors.keys() == there.tensors.keys()
    assert all(torch.equal(v, before[k]) and v.device.type == "cpu" for k, v in model.state_dict().items())
    for name, tensor in there.tensors.items():
        assert tensor.codes.device.type == tensor.scale.device.type == "cpu"
        same = tensor.codes == here.tensors[name].codes
        exact = device == "cpu" or method is nearest
        assert bool(same.all()) if exact else float(same.float().mean()) > 0.5, name
    for name, value in there.folded.items():
        assert value.device.type == "cpu"
        assert device == "cuda" or torch.equal(value, here.folded[name])


def test_a_block_and_all_that_it_is_called_with_go_to_the_device():
    """Meta tensors have no values, so nothing can have come from anywhere else."""
    model, seen = tiny(layers=1), []

    def visit(block):
        hidden = block.output(0)
        seen.append((hidden.shape, hidden.device.type))
        parts = [*block.module.parameters(), *block.original.parameters(), *block.inputs, *block.full]
        seen.extend(("part", part.device.type) for part in parts)
        return Changes()

    walk(model, BATCHES, "model.layers", visit, True, recipe(), full="inputs", device="meta")
    assert seen[0] == ((2, 12, 64), "meta")
    assert {kind for _, kind in seen} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@torch.no_grad()
def test_a_copy_computes_the_same_and_shares_nothing():
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()
    linear[0].weight.requires_grad_(False)
    twin, x = copied(linear, torch.device("cpu")), torch.randn(4, 8)
    assert torch.equal(twin(x), linear(x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in linear.parameters()]
    for mine, own in zip(twin.state_dict().values(), linear.state_dict().values(), strict=True):
        assert mine.data_ptr() != own.data_ptr()


def test_the_model_gets_its_blocks_back_after_an_error():
    model = tiny()
    blocks = list(model.model.layers)
    with pytest.raises(IndexError):
        walk(model, [torch.tensor([[1, 999]])], "model.layers", lambda block: Changes(), True, recipe())
    assert list(model.model.layers) == blocks


def test_hidden_states_that_are_not_finite_name_the_block():
    model = tiny(layers=3)

    def visit(block):
        if block.name.endswith("1"):
            with torch.no_grad():
                block.module.mlp.down_proj.weight.fill_(float("inf"))
        return Changes()

    with pytest.raises(ValueError, match=r"model\.layers\.1: its output is not finite"):
        walk(model, BATCHES, "model.layers", visit, True, recipe())


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_states_of_any_batch_that_are_not_finite_name_the_block(batch):
    def visit(block):
        block.inputs[batch].fill_(float("nan"))
        return Changes()

    assert len(BATCHES) == 3
    with pytest.raises(ValueError, match=r"model\.layers\.0: its output is not finite"):
        walk(tiny(), BATCHES, "model.layers", visit, True, recipe())


def test_blocks_get_no_mask_for_whole_windows(monkeypatch):
    """transformers asks the device for packed sequences, or builds a dense mask where something traces."""
    model, masks = tiny(), []

    def visit(block):
        masks.extend(kwargs["attention_mask"] for kwargs in block.kwargs)
        return Changes()

    monkeypatch.setattr(masking_utils, "is_tracing", lambda *args: True)
    name = model.config._attn_implementation
    walk(model, BATCHES, "model.layers", visit, True, recipe())
    assert masks == [None] * 2 * len(BATCHES)
    assert model.config._attn_implementation == name


def test_a_tensor_of_a_block_that_is_not_finite_is_named_before_its_visit():
    model, visited = tiny(layers=3), []
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
        model.model.layers[2].mlp.up_proj.weight[3] = float("inf")

    def visit(block):
        visited.append(block.name)
        return Changes()

    with pytest.raises(ValueError, match=r"^model\.layers\.1\.post_attention_layernorm\.weight: not finite"):
        walk(model, BATCHES, "model.layers", visit, True, recipe())
    assert visited == ["model.layers.0"]


@pytest.mark.parametrize("batches", [[], [torch.full((2, 8), 7)]], ids=["none", "one token"])
def test_batches_that_calibrate_nothing_are_refused_before_any_block(batches):
    with pytest.raises(ValueError, match="calibration batches"):
        walk(tiny(), batches, "model.layers", lambda block: 1 / 0, True, recipe())
