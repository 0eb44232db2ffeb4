from dataclasses import replace

import pytest

from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.scheme import E4M3, Scheme, input_parts, is_input_scale


def test_schemes_are_values():
    assert Scheme(IntGrid(4), PerGroup(64)) == Scheme(IntGrid(4), PerGroup(64))
    assert len({Scheme(IntGrid(4), PerGroup(64)), Scheme(IntGrid(4), PerGroup(32))}) == 2
    assert str(Scheme(IntGrid(4), PerGroup(64), symmetric=False)) == "int4_g64_asym"
    assert str(Scheme(IntGrid(4), PerGroup(64), convention="signed")) == "int4_g64_signed"
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
        ({"convention": "signed", "dynamic": True}, "convention='signed' with dynamic=true"),
        ({"convention": "vllm", "symmetric": False}, "about symmetric integer grids"),
    ],
)
def test_what_means_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**{"grid": IntGrid(4), "granularity": PerChannel()} | change)


def test_signed_scales_are_of_symmetric_integers_and_elsewhere_the_word_is_dropped():
    for other in (Scheme(IntGrid(4), PerGroup(64), symmetric=False), Scheme(FloatGrid("e4m3"), PerGroup(64))):
        assert replace(other, convention="signed") == other
    assert Scheme(IntGrid(4), PerGroup(64), convention="signed").convention == "signed"


@pytest.mark.parametrize(
    ("scheme", "parts"),
    [
        (None, ()),
        (Scheme(IntGrid(8), PerToken(), dynamic=True), ()),
        (Scheme(IntGrid(8), PerToken(), symmetric=False, dynamic=True), ()),
        (Scheme(IntGrid(8), PerTensor()), ("input_scale",)),
        (Scheme(IntGrid(8), PerTensor(), symmetric=False), ("input_scale", "input_zero_point")),
        (Scheme(FloatGrid("e2m1"), PerGroup(16), dynamic=True, scale_dtype=E4M3), ("input_global_scale",)),
    ],
)
def test_what_is_stored_of_an_input(scheme, parts):
    assert input_parts(scheme) == parts
    assert all(is_input_scale(f"a.b.{part}") for part in parts)
    assert not is_input_scale("a.input_scale.weight")
