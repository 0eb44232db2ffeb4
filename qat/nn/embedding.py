"""QATEmbedding: a lookup of rows that are what will be served."""

from torch import Tensor, nn

from qat.nn.fake_quantize import FakeQuantize, Phase


class QATEmbedding(nn.Embedding):
    """Rows of Q(W) for fp32 masters W; parameter names are those of the `nn.Embedding` that it replaces.

    Only the rows that are looked up are fake-quantized, so a lookup costs what its tokens cost, whatever the
    vocabulary. They come in the masters' dtype, under autocast too, as those of `nn.Embedding` do; a `QATLinear` that
    is tied to the table shares its weight and its `FakeQuantize`, and has the same codes in the dtype of its matmul.
    Gradients of both add up. The padding row has none through the lookup, neither for the weight nor for its scales.
    """

    weight_fake_quant: FakeQuantize

    @classmethod
    def from_float(cls, embedding: nn.Embedding, weight: FakeQuantize) -> "QATEmbedding":
        """Takes over an embedding's table, without a copy."""
        assert type(embedding) is nn.Embedding, "another class may do more than look up"
        self = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        self.weight, self.weight_fake_quant = embedding.weight, weight
        return self.train(embedding.training)

    def master(self) -> Tensor:
        """The table that is rounded, `[V, H]`, fp32."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` -> `[..., H]`."""
        if self.weight_fake_quant.phase is Phase.OFF:
            return super().forward(input)
        found = self.weight_fake_quant(self.weight, self.weight.dtype, input.flatten()).view(*input.shape, -1)
        if self.padding_idx is None:
            return found
        return found.where((input != self.padding_idx)[..., None], found.detach())
