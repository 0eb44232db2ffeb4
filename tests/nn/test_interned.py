"""A value comes back from its name."""

from dataclasses import dataclass

import pytest

from qat.nn.estimators import LSQ
from qat.nn.interned import intern, interned


def test_a_value_comes_back_from_its_name():
    assert interned(intern(LSQ(False))) == LSQ(False)
    assert intern(LSQ(False)) == intern(LSQ(scale_gradient=False)) != intern(LSQ())


def test_classes_of_the_same_name_are_told_apart():
    @dataclass(frozen=True)
    class LSQ:
        scale_gradient: bool = True

    from qat.nn import estimators

    assert intern(LSQ()) != intern(estimators.LSQ())


def test_a_name_that_nobody_interned_is_a_mistake():
    with pytest.raises(AssertionError, match="never interned"):
        interned("nobody.Nothing()")
