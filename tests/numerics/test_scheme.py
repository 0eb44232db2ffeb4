import pytest

from qat.numerics.granularity import PerChannel, PerGroup, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme


def test_schemes_are_values():
    assert Scheme(IntGrid(4), PerGroup(64)) == Scheme(IntGrid(4), PerGroup(64))
    assert len({Scheme(IntGrid(4), PerGroup(64)), Scheme(IntGrid(4), PerGroup(32))}) == 2
    assert str(Scheme(IntGrid(4), PerGroup(64), symmetric=False)) == "int4_g64_asym"
    assert str(Scheme(IntGrid(8), PerToken(), dynamic=True)) == "int8_token_dynamic"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": IntGrid(1)}, "a scheme needs 2 bits"),
        ({"grid": 4}, "expected an IntGrid"),
        ({"granularity": 64}, "expected PerTensor"),
        ({"granularity": PerToken()}, "needs dynamic=true"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8': one of float32"),
        ({"convention": "narrow"}, "convention='narrow': one of ct"),
    ],
)
def test_what_means_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**{"grid": IntGrid(4), "granularity": PerChannel()} | change)
