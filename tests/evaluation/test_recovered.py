"""The formulas of the headline, written out with numbers that can be followed by hand."""

import pytest

from qat.evaluation.recovered import recovered

TOKENS = 10  # in a window
PTQ = ["rtn", "gptq", "awq"]


def arm(kl, *nll):
    """An arm with a mean nll per token for each window."""
    return {
        "kl": kl,
        "nll": sum(nll) / len(nll),
        "tokens": TOKENS * len(nll),
        "windows": {"nll": [TOKENS * value for value in nll]},
    }


@pytest.fixture
def arms():
    return {
        "fp": arm(0.0, 2.0, 3.0, 4.0, 5.0),
        "rtn": arm(0.40, 2.4, 3.4, 4.4, 5.6),
        "gptq": arm(0.20, 2.2, 3.2, 4.2, 5.3),
        "awq": arm(0.25, 2.1, 3.2, 4.2, 5.2),
        "qat": arm(0.05, 2.1, 3.1, 4.1, 5.1),
    }


def test_the_formulas(arms):
    found = recovered(arms, PTQ)
    assert list(found) == ["vs_rtn", "vs_gptq", "vs_awq", "vs_best_ptq"]
    assert found["vs_rtn"] == pytest.approx({"kl": 1 - 0.05 / 0.40, "nll": (0.45 - 0.1) / 0.45})
    assert found["vs_gptq"] == pytest.approx({"kl": 1 - 0.05 / 0.20, "nll": (0.225 - 0.1) / 0.225})
    assert found["vs_awq"] == pytest.approx({"kl": 1 - 0.05 / 0.25, "nll": (0.175 - 0.1) / 0.175})


def test_each_metric_has_its_own_winner(arms):
    best = recovered(arms, PTQ)["vs_best_ptq"]
    assert best["candidates"] == ["rtn", "gptq", "awq"]
    assert best["kl"] == {"value": pytest.approx(0.75), "winner": "gptq"}
    assert best["nll"] == {"value": pytest.approx((0.175 - 0.1) / 0.175), "winner": "awq"}


def test_a_method_under_a_name_of_its_own_can_win(arms):
    arms["mine"] = arm(0.1, 2.1, 3.1, 4.1, 5.15)
    best = recovered(arms, [*PTQ, "mine"])["vs_best_ptq"]
    assert (best["kl"]["winner"], best["nll"]["winner"]) == ("mine", "mine")


def test_a_trained_arm_that_lost_more_has_recovered_a_negative_part(arms):
    arms["qat"] = arm(0.5, 2.9, 3.9, 4.9, 5.9)
    found = recovered(arms, PTQ)["vs_gptq"]
    assert found == pytest.approx({"kl": 1 - 0.5 / 0.2, "nll": (0.225 - 0.9) / 0.225})


def test_the_reference_can_be_another_arm(arms):
    arms["ft_fp"] = arm(0.3, 1.5, 2.5, 3.5, 4.5)
    found = recovered(arms, PTQ, reference="ft_fp")
    assert found["vs_gptq"]["nll"] == pytest.approx((0.225 - 0.1) / (0.225 + 0.5))
    assert found["vs_gptq"]["kl"] == pytest.approx(0.75)


@pytest.mark.parametrize(("spread", "significant"), [(0.99, True), (1.01, False)])
def test_null_below_three_standard_errors_of_the_paired_difference(arms, spread, significant):
    """Differences 0.2 +- d over four windows: sd = d sqrt(4/3), standard error d / sqrt(3); 3 of them are sqrt(3) d."""
    d = spread * 0.2 / 3**0.5
    arms["gptq"] = arm(0.2, 2.2 + d, 3.2 - d, 4.2 + d, 5.2 - d)
    value = recovered(arms, PTQ)["vs_gptq"]["nll"]
    assert (value == pytest.approx(0.5)) if significant else (value is None)


def test_null_where_the_ptq_method_lost_nothing(arms):
    arms["gptq"] = arm(0.2, 1.9, 2.9, 3.9, 4.9)
    arms["awq"] = arm(0.0, 2.0, 3.0, 4.0, 5.0)
    found = recovered(arms, PTQ)
    assert found["vs_gptq"]["nll"] is None
    assert found["vs_awq"] == {"kl": None, "nll": None}
    assert found["vs_best_ptq"]["nll"] == {"value": None, "winner": "gptq"}


def test_null_where_a_single_window_tells_nothing_of_the_noise():
    arms = {"fp": arm(0.0, 2.0), "rtn": arm(0.4, 2.4), "qat": arm(0.1, 2.1)}
    assert recovered(arms, ["rtn"])["vs_rtn"] == {"kl": pytest.approx(0.75), "nll": None}


def test_without_a_ptq_arm_there_is_nothing_to_recover(arms):
    assert recovered({"fp": arms["fp"], "qat": arms["qat"], "ft_fp": arms["fp"]}, []) == {}
