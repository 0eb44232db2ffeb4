import pytest

from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (8, 64), (1,)),
        (PerChannel(), (8, 64), (8, 1)),
        (PerGroup(16), (8, 64), (8, 4)),
        (PerToken(), (2, 5, 64), (2, 5, 1)),
    ],
)
def test_scale_shape_groups_the_tensor(granularity, shape, expected):
    import torch

    found = granularity.scale_shape(shape)
    assert found == expected
    assert torch.empty(shape).reshape(*found, -1).shape[:-1] == found


def test_a_group_that_does_not_divide_names_sizes_that_fit():
    with pytest.raises(
        ValueError, match=r"group_size=128 does not divide 576 in-features; sizes that fit: 16, 32, 64,"
    ):
        PerGroup(128).scale_shape((10, 576))


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_group_sizes_are_positive_integers(size):
    with pytest.raises(ValueError, match="group_size="):
        PerGroup(size)
