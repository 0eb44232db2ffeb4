import math

import pytest

from qat.nn.adapter import LoRA, QLoRA


@pytest.mark.parametrize("kind", [LoRA, QLoRA])
@pytest.mark.parametrize(
    "bad",
    [{"rank": bad} for bad in (0, -1, 1.5, True)] + [{"alpha": bad} for bad in (0.0, -1, math.inf, math.nan)],
)
def test_values_out_of_range_are_refused_by_name(kind, bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}="):
        kind(**bad)


@pytest.mark.parametrize("bad", [{"dropout": 1.0}, {"dropout": -0.1}, {"dropout": math.nan}, {"group_size": 0}])
def test_what_qlora_alone_has_too(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}="):
        QLoRA(**bad)


def test_the_edges_are_allowed():
    assert LoRA(rank=1, alpha=0.5).rank == 1
    assert QLoRA(dropout=0.0, group_size=1).then is None
