"""How much memory of a GPU each PTQ method takes, from the shape of a model that stays on the CPU.

Counted are tensors that live at once where a method takes most, in bytes; not what allocators and libraries add. One
block lies on the GPU twice, as it was and as it becomes, and beside it the hidden states at its boundary, `2 T H` bytes
(of GPTAQ twice). On top of that
- GPTQ has the Hessian of each linear, `4 I^2`, and to factorize it another in the order of the columns and three in
  fp64: `32 I^2`, of which the widest linear, the MLP's last one, decides; GPTAQ has the cross matrix, too;
- AWQ keeps what goes into attention, or into the MLP, into its last linear, and what comes out: `2 T (2 H + M)`; and
  Gram matrices of inputs, `4 I^2` for each linear that is clipped.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden size, size of the MLP, decoder blocks, heads, key-value heads, vocabulary, whether it is tied."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Out- and in-features of the linears of a block, those that share their input as one."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = [(self.hidden + 2 * kv, self.hidden), (self.hidden, self.hidden)]
        return [*attention, (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)]

    @property
    def block(self) -> int:
        """Weights of a block."""
        return sum(rows * columns for rows, columns in self.stages)


SHAPES = {
    "tiny": Shape(256, 512, 2, 4, 2, 512, True),
    "llama32_1b": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "llama3_8b": Shape(4096, 14336, 32, 32, 8, 128256, False),
    "llama3_70b": Shape(8192, 28672, 80, 64, 8, 128256, False),
}


def peak(shape: Shape, method: str, tokens: int, batch: int) -> float:
    """GiB that a method takes at its peak.

    Args:
        shape: Of the model.
        method: `rtn`, `mse_rtn`, `gptq_paper`, `gptq` (two streams) or `awq`.
        tokens: Of calibration.
        batch: Tokens of one batch.
    """
    if method.endswith("rtn"):
        return _nearest(shape) / GIB
    forward = batch * (3 * 2 * shape.hidden + 3 * 2 * shape.intermediate)  # residual, norm; gate, up and their product
    resident = 2 * 2 * shape.block + 2 * tokens * shape.hidden * (2 if method == "gptq" else 1)
    if method == "awq":
        return (resident + _awq(shape, tokens, batch, forward)) / GIB
    return (resident + max(_gptq(*stage, batch, forward, method == "gptq") for stage in shape.stages)) / GIB


def _nearest(shape: Shape) -> int:
    """A weight in bf16 and fp32, as codes and what they say, and three of it in fp64 where its error is measured."""
    return (2 + 4 + 1 + 4 + 3 * 8) * shape.hidden * shape.intermediate


def _gptq(rows: int, columns: int, batch: int, forward: int, both: bool) -> int:
    square, weight = 4 * columns**2, 4 * rows * columns
    sums = square * (2 if both else 1)
    heard = batch * columns * (2 + 4 + 2 + 4) if both else 0  # another input, a difference and its halves
    hear = square + forward + heard
    factor = square + 3 * 2 * square + weight
    solve = square * (4 if both else 1) + 5 * weight  # weight, rest, scales and two copies on the way
    return sums + max(hear, factor, solve)


def _awq(shape: Shape, tokens: int, batch: int, forward: int) -> int:
    weights, grams = 4 * shape.block, 4 * (2 * shape.hidden**2 + shape.intermediate**2)
    mlp = 2 * tokens * (2 * shape.hidden + shape.intermediate)  # attention keeps 3 H, and is done
    hear = forward + 2 * 4 * batch * shape.intermediate  # activations in fp32 and their magnitude
    search = forward + 2 * 4 * batch * shape.hidden + 6 * 4 * shape.hidden * shape.intermediate
    return weights + grams + mlp + max(hear, search)
