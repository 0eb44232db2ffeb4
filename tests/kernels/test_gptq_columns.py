"""A block of columns is rounded as GPTQ defines it, and on a GPU the recorded loop is the loop."""

import time

import pytest
import torch
from tiny import recipe, tiny
from tiny_grids import bits

from qat.kernels import gptq_columns
from qat.kernels.gptq_columns import Recorded, _columns, forget, round_block
from qat.nn.observers.minmax import MinMax
from qat.numerics.grid import CODEBOOKS, Codebook, FloatGrid, IntGrid
from qat.numerics.levels import code_dtype, decode
from qat.ptq.gptq import gptq

GRIDS = [IntGrid(b) for b in (2, 3, 4, 8)] + [Codebook(n) for n in CODEBOOKS] + [FloatGrid("e4m3"), FloatGrid("e2m1")]


def block(rows=24, columns=16, asymmetric=False, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randn(rows, columns, generator=generator) * 0.05
    scale = torch.rand(rows, columns, generator=generator) * 0.02 + 0.01
    zero = torch.randint(-2, 2, (rows, columns), generator=generator).float() if asymmetric else None
    factor = torch.randn(columns, columns, generator=generator).triu(1) * 0.3 + torch.eye(columns)
    return [part if part is None else part.to(device) for part in (rest, scale, zero, factor)]


def looped(rest, scale, zero, factor, grid):
    codes, errors = torch.empty_like(rest, dtype=code_dtype(grid)), torch.empty_like(rest)
    _columns(rest.clone(), scale, zero, factor, grid, codes, errors)
    return codes, errors


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_errors_make_up_for_what_rounding_loses(grid):
    """W = Q + E U, with Q what the codes say and U the factor: each column's error is spread over those after it."""
    rest, scale, zero, factor = block()
    weight = rest.clone()
    codes, errors = round_block(rest, scale, zero, factor, grid)
    rounded = decode(codes, grid) * scale
    assert torch.allclose(rounded + errors @ factor.triu(), weight, atol=1e-5)


def cases():
    for grid in GRIDS:
        for asymmetric in (False, True) if isinstance(grid, IntGrid) else (False,):
            yield pytest.param(grid, asymmetric, id=f"{grid}{'_asym' if asymmetric else ''}")


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "asymmetric"), list(cases()))
def test_a_recorded_loop_is_the_loop_bit_for_bit(grid, asymmetric):
    for rows, columns in ((24, 16), (960, 64), (24, 16), (5, 1)):
        for seed in range(3):  # of one shape, one recording
            parts = block(rows, columns, asymmetric, seed, "cuda")
            codes, errors = looped(*parts, grid)
            found_codes, found_errors = round_block(*parts, grid)
            assert torch.equal(found_codes, codes)
            assert torch.equal(bits(found_errors), bits(errors))
    forget()


@pytest.mark.gpu
def test_gptq_finds_the_same_codes_with_and_without_a_recording(monkeypatch):
    model = tiny().cuda()
    batches = list(torch.randint(0, 256, (4, 24)).split(2))
    recorded = gptq(model, recipe(3), batches, observer=MinMax(), block_size=48)
    monkeypatch.setattr("qat.ptq.gptq_solver.round_block", looped)
    plain = gptq(model, recipe(3), batches, observer=MinMax(), block_size=48)
    for name, tensor in plain.tensors.items():
        assert torch.equal(recorded.tensors[name].codes, tensor.codes), name
    assert [row["loss"] for row in recorded.layers] == [row["loss"] for row in plain.layers]
    assert gptq_columns._recorded.cache_info().currsize == 0


@pytest.mark.gpu
def test_a_replay_is_several_times_faster_than_the_loop():
    parts, grid = block(3072, 128, device="cuda"), IntGrid(4)
    recorded, seconds = Recorded(3072, 128, grid, False, torch.device("cuda", 0)), []
    for run in (lambda: looped(*parts, grid), lambda: recorded.replay(*parts)):
        run()
        torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    print(f"loop {seconds[0] * 200:.1f} ms, replay {seconds[1] * 200:.1f} ms")
    assert seconds[1] < seconds[0] / 3
