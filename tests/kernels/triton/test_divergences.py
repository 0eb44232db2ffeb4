"""The twin: float64 within the reference's bounds, its laws on a GPU; without one, interpreted where Triton is."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from exact_divergences import DTYPES, SHAPES, case, check, exact, run

from qat.kernels import divergences as reference

pytest.importorskip("triton")

from qat.kernels.triton import divergences as twin

pytestmark = [  # Triton's interpreter computes with numpy, lanes that are masked out included
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

NAMES = ("kl", "jsd", "cross_entropy", "kl_gradient", "mixed_gradient", "cross_entropy_gradient")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_references(name):
    assert inspect.signature(getattr(twin, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_against_float64(device, shape, dtype):
    tensors = case(*shape, dtype, device=device)
    found = run(twin, *tensors)
    check(found, exact(*tensors, ulps=1 if device == "cpu" else 0.5))  # the interpreter truncates to bf16
    for name, result in found.items():
        assert result.dtype == (dtype if name.endswith("gradient") else torch.float32), name


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_vocabulary_and_many_tokens(device):
    for shape in [(1, 262144), (70 if device == "cpu" else 70_000, 33)]:
        tensors = case(*shape, torch.float32, device=device)
        check(run(twin, *tensors), exact(*tensors))


@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_do_not_overflow_wherever_the_largest_lies(device):
    tensors = case(3, 5000, torch.float32, 1e4, device)
    check(run(twin, *tensors), exact(*tensors))
    rising = torch.linspace(-1e4, 1e4, 5000, device=device)
    tensors = (torch.stack([rising, rising.flip(0), -rising]), torch.stack([rising, rising, rising]), *tensors[2:])
    check(run(twin, *tensors), exact(*tensors))


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_diverge_by_nothing_and_a_shift_of_them_by_its_rounding(device):
    student, _, _, scale = case(3, 5000, torch.float32, device=device)
    value, lse, other = twin.kl(student, student.clone())
    assert not value.any()
    assert torch.equal(lse, other)
    assert not twin.kl_gradient(student, student.clone(), lse, lse, scale).any()
    assert float(twin.kl(student, student + 1000.0)[0].abs().max()) < 1e-4  # 1000 costs 2**-14 of each logit


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_lie_apart_and_dtypes_differ(device):
    student, teacher, targets, scale = case(3, 5000, torch.float32, device=device)
    wide = torch.full((3, 5011), torch.nan, device=device)
    wide[:, :5000] = student
    students = {"apart": wide[:, :5000], "columns": student.T.contiguous().T}
    teachers = {"apart": teacher.bfloat16(), "columns": teacher.bfloat16()[:1].expand(3, -1)}
    for name in students:
        tensors = (students[name], teachers[name], targets, scale[:1].expand(3))
        check(run(twin, *tensors), exact(*tensors))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_a_number_shows_and_stays_in_its_row(device):
    student, teacher, targets, _ = case(3, 5000, torch.float32, device=device)
    for tensor in (student, teacher):
        tensor[0, 4500] = torch.nan
    targets[:] = torch.tensor([5, reference.NO_TARGET, 5000])
    kl, jsd = twin.kl(teacher, student)[0], twin.jsd(student, teacher, 0.5)[0]
    assert kl.isnan().tolist() == jsd.isnan().tolist() == [True, False, False]
    assert twin.cross_entropy(student, targets)[0].isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_that_the_student_rules_out_has_no_probability(device):
    student, _, targets, scale = case(3, 5000, torch.float32, device=device)
    student[:, :4100] = -torch.inf  # whole blocks
    targets[:] = 4200
    value, lse = twin.cross_entropy(student, targets)
    assert torch.allclose(lse, student.logsumexp(-1))
    assert torch.allclose(value, lse - student[:, 4200], atol=1e-5)
    assert not twin.cross_entropy_gradient(student, targets, lse, scale)[:, :4100].any()


REFERENCE = SimpleNamespace(**{name: getattr(reference, name).__wrapped__ for name in NAMES})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_twin_runs_and_is_the_reference_within_both_bounds(dtype):
    tensors = case(300, 49152, dtype, device="cuda")
    found, bounds = run(reference, *tensors), exact(*tensors)
    assert all(torch.equal(found[n], result) for n, result in run(twin, *tensors).items())  # and twice the same bits
    check(found, {n: (result.double(), 2 * bounds[n][1]) for n, result in run(REFERENCE, *tensors).items()})


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_it_is_replayed_bit_for_bit():
    static = case(300, 50257, torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(twin, *static)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(twin, *static)
    for scale in (1.0, 5.0):
        fresh = case(300, 50257, torch.bfloat16, scale, "cuda")
        for place, values in zip(static, fresh, strict=True):
            place.copy_(values)
        graph.replay()
        expected = run(twin, *fresh)
        assert all(torch.equal(captured[name], result) for name, result in expected.items())
