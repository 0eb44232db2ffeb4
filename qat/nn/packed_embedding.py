"""PackedEmbedding: an embedding whose table stays packed. For serving; it has no gradient and no parameters."""

import torch
from torch import Tensor, nn

from qat.kernels.w4a16 import Table
from qat.nn.packed_linear import PackedLinear


class PackedEmbedding(nn.Module):
    """Looks rows up in a packed weight and dequantizes these rows alone; the table never exists in floating point.

    A head that is tied to it is the very linear that it is made of, so there is one copy of the weight.

    Args:
        linear: A linear that has the table as its weight.

    Raises:
        ValueError: Its groups are not of consecutive in-features, so its rows are not the table's.
    """

    def __init__(self, linear: PackedLinear):
        super().__init__()
        if linear.order is not None:
            raise ValueError("a table with a g_idx is not served; only linears have one")
        self.linear = linear

    def specialize(self, spare: int) -> None:
        """`PackedLinear.specialize` for a tied head, as far as rows can still be looked up in the layout."""
        before = self.linear.weight
        self.linear.specialize(spare)
        if not isinstance(self.linear.weight, Table):
            self.linear.weight = before

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids `[T]` -> `[T, N]` in `dtype`."""
        assert isinstance(self.linear.weight, Table), "laid out for a kernel that has no rows"
        return self.linear.weight.lookup(tokens, dtype)
