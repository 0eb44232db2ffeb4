import pytest
import torch
from tiny import recipe, tiny

from qat.nn.estimators import LSQ, StraightThrough
from qat.nn.observers.minmax import MinMax
from qat.surgery.prepare import prepare
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule


def module(teacher="same", loss=None, **kwargs):
    student = tiny()
    prepare(student, recipe(), MinMax(), kwargs.pop("estimator", LSQ()))
    teacher = tiny() if teacher == "same" else teacher
    return QATModule(student, teacher, loss or Loss(), PhaseSchedule(), Optim(), 4, **kwargs)


def test_the_teacher_is_no_part_of_the_module():
    found = module()
    assert found.teacher is not None
    assert not [n for n, _ in found.named_parameters() if "teacher" in n]
    assert all(n.startswith(("student.", "val_nll")) for n in found.state_dict())


def test_masters_that_are_not_fp32_are_a_bug():
    found = module()
    found.student.model.norm.parametrizations.weight.original.data = torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"model\.norm.*masters are fp32, found torch\.bfloat16"):
        found.configure_optimizers()


def test_another_vocabulary_and_a_missing_teacher_are_refused():
    other = tiny()
    other.config.vocab_size = 300
    with pytest.raises(ValueError, match="teacher vocabulary 300, student 256"):
        module(other)
    with pytest.raises(ValueError, match="needs the full-precision teacher"):
        module(None)
    assert module(None, Loss(kl=0.0, ce=1.0)).teacher is None


def test_a_checkpoint_of_another_schedule_is_refused():
    found = module(estimator=StraightThrough())
    checkpoint = {"global_step": 1, "qat_rng": {"cpu": torch.get_rng_state()}, "qat_phase": "learn"}
    with pytest.raises(ValueError, match="the checkpoint is in phase learn, the schedule says frozen"):
        found.on_load_checkpoint(checkpoint)


def test_clipping_keeps_weights_and_scales_apart():
    found = module()
    found.log = lambda *args, **kwargs: None
    optimizer, _ = Optim().build(found.student, 4)
    groups = {g["name"]: g["params"] for g in optimizer.param_groups}
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 100.0 if name == "scales" else 1e-3)
    before = groups["weights"][0].grad.clone()
    found.configure_gradient_clipping(optimizer, 10.0, "norm")
    norm = torch.stack([p.grad.norm() for p in groups["scales"]]).norm()
    assert float(norm) == pytest.approx(10.0, rel=1e-3)
    assert torch.equal(groups["weights"][0].grad, before)
    groups["vectors"][0].grad[0] = float("inf")
    with pytest.raises(ValueError, match="the gradient of the weights is inf at step 0"):
        found.configure_gradient_clipping(optimizer, 10.0, "norm")


def test_one_window_that_is_not_a_number_is_not_left_out_of_the_mean():
    found = module()
    found.val_nll.update(torch.tensor(1.0), weight=31)
    found.val_nll.update(torch.tensor(float("nan")), weight=31)
    assert bool(found.val_nll.compute().isnan())
