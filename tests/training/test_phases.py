import pytest

from qat.nn.fake_quantize import Phase
from qat.training.phases import PhaseSchedule


def test_phases_follow_the_step():
    schedule = PhaseSchedule(start=2, freeze=4)
    learned = [schedule.phase(step, True) for step in range(6)]
    assert learned == [Phase.OFF] * 2 + [Phase.OBSERVE] * 2 + [Phase.LEARN] * 2
    assert schedule.phase(4, False) is Phase.FROZEN
    assert PhaseSchedule().phase(0, True) is Phase.LEARN


@pytest.mark.parametrize("steps", [(-1, 0), (3, 2)])
def test_impossible_orders_are_refused(steps):
    with pytest.raises(ValueError, match="0 <= start <= freeze"):
        PhaseSchedule(*steps)
