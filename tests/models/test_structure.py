import pytest
import torch
from tiny import tiny

from qat.models.families import STRUCTURES, structure_of


def test_every_name_exists_and_shapes_fit():
    model = tiny()
    structure = structure_of("llama")
    block = model.get_submodule(structure.blocks)[0]
    for stage in structure.stages:
        assert len({block.get_submodule(name).in_features for name in stage}) == 1
    for smoothing in structure.smoothings:
        channels = block.get_parameter(f"{smoothing.previous}.weight").shape[0]
        wanted = block.get_submodule(smoothing.linears[0]).in_features
        assert block.get_submodule(smoothing.inspect) is not None
        assert (wanted == channels) != (smoothing.repeats and wanted != channels)
    assert model.get_parameter(f"{structure.norm}.weight").shape == (model.config.hidden_size,)


def test_stages_cover_every_linear_of_a_block_in_the_order_of_the_data():
    block = tiny().model.layers[0]
    linears = {n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    structure = structure_of("llama")
    assert {name for stage in structure.stages for name in stage} == linears
    called = []
    for name in linears:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    model = tiny()
    model.model.layers[0] = block
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    position = {name: i for i, stage in enumerate(structure.stages) for name in stage}
    assert [position[name] for name in called] == sorted(position[name] for name in called)


def test_unknown_families_are_refused_by_name():
    with pytest.raises(ValueError, match="'gpt2' is not described"):
        structure_of("gpt2")
    assert set(STRUCTURES) == {"llama", "mistral", "qwen2", "qwen3", "gemma"}
