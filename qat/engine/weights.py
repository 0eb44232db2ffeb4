"""Weights: what a model file asks for, by its name in the checkpoint, checked against the config's shapes.

Tensors are read one at a time, and only what is served stays in memory: packed words for quantized weights, the storage
dtype for plain ones. Vectors (norms, biases) are widened: exact, and too small to count.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qat.engine.layers import Concatenated, Embedding, Linear, RMSNorm
from qat.formats.base import Checkpoint
from qat.nn.packed_embedding import PackedEmbedding
from qat.nn.packed_linear import PackedLinear
from qat.nn.quantized_input import QuantizedInput
from qat.numerics.granularity import PerTensor
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme, input_parts

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
SPARE = 0.08  # share of the file's bytes that faster layouts may take beside it; in all, weights may grow by 0.1


class Weights:
    """The tensors of a checkpoint, handed out as modules.

    Args:
        checkpoint: An open checkpoint.
        config: Its configuration.
        device: Where weights shall lie.
        dtype: Of the activations.
        reference: Keep packed words; else lay them out for the device's fastest kernel.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        reference: bool,
    ):
        self.device, self.dtype = device, dtype
        self._checkpoint, self._config, self._reference = checkpoint, config, reference
        self._left = {*checkpoint.plain, *checkpoint.tensors}
        self.file_bytes = sum(file.stat().st_size for file in set(checkpoint.files.values()))
        self._spare = int(SPARE * self.file_bytes)

    def linear(self, prefix: str, parts: Mapping[str, int], columns: int, bias: bool = False) -> nn.Module:
        """One linear for all modules `prefix.part` of a common input, its outputs in their order.

        Args:
            prefix: What their names begin with.
            parts: Name and out-features of each.
            columns: In-features.
            bias: Whether they have one.

        Raises:
            ValueError: A tensor is missing or has another shape; the message names tensor and file.
        """
        names = {f"{prefix}.{part}" if prefix else part: rows for part, rows in parts.items()}
        schemes = {self._schemes(name) for name in names}
        weight, _ = next(iter(schemes))
        if len(names) > 1 and (len(schemes) > 1 or (weight and isinstance(weight.granularity, PerTensor))):
            return Concatenated([self.linear(prefix, {part: rows}, columns, bias) for part, rows in parts.items()])
        biases = [self.vector(f"{name}.bias", rows).to(self.dtype) for name, rows in names.items() if bias]
        if weight is None:
            weights = [self._plain(f"{name}.weight", (rows, columns)) for name, rows in names.items()]
            return Linear(torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if bias else None)
        tensors = [self._quantized(name, (rows, columns)) for name, rows in names.items()]
        inputs = [self._input(name) for name in names]
        if not _alike(tensors, inputs):
            own = biases if bias else [None] * len(tensors)
            return Concatenated([self._packed(*each) for each in zip(tensors, own, inputs, strict=True)])
        return self._packed(_fuse(tensors), torch.cat(biases) if bias else None, inputs[0])

    def _packed(self, tensor: QuantizedTensor, bias: Tensor | None, input: QuantizedInput | None) -> PackedLinear:
        layer = PackedLinear(tensor, bias, input)
        self._specialize(layer, layer)
        return layer

    def norm(self, name: str, size: int) -> RMSNorm:
        """The RMSNorm of this name."""
        return RMSNorm(self.vector(f"{name}.weight", size), self._config.rms_norm_eps)

    def vector(self, name: str, size: int) -> Tensor:
        """A vector in fp32."""
        return self._plain(name, (size,)).float()

    def embedding(self, name: str, rows: int, columns: int) -> Embedding | PackedEmbedding:
        """A table, packed or in its storage dtype."""
        if name in self._checkpoint.tensors:
            layer = PackedEmbedding(PackedLinear(self._quantized(name, (rows, columns))))
            if self._config.tie_word_embeddings:  # else it is not multiplied by
                self._specialize(layer, layer.linear)
            return layer
        return Embedding(self._plain(f"{name}.weight", (rows, columns)))

    def head(self, embedding: Embedding | PackedEmbedding) -> nn.Module:
        """The linear onto the vocabulary; a tied one has the embedding's own table, packed or not."""
        if not self._config.tie_word_embeddings:
            return self.linear("", {"lm_head": self._config.vocab_size}, self._config.hidden_size)
        if isinstance(embedding, PackedEmbedding):
            return embedding.linear
        if "lm_head.weight" in self._left and not torch.equal(
            self._plain("lm_head.weight", tuple(embedding.weight.shape)), embedding.weight
        ):
            raise ValueError(
                f"{self._checkpoint.file('lm_head.weight')}: lm_head.weight is not the embedding that config.json ties "
                f"it to"
            )
        head = Linear(torch.empty(0))
        head.weight = embedding.weight
        return head

    def finish(self) -> None:
        """Raises ValueError if the checkpoint holds a tensor that the model has no place for."""
        # Checkpoints of the first Llamas carry the rotation's frequencies, which follow from the config.
        strays = sorted(name for name in self._left if not name.endswith(".rotary_emb.inv_freq"))
        if strays:
            name = strays[0]
            file = self._checkpoint.file(name)
            raise ValueError(f"{file}: tensor {name} has no place in the {self._config.model_type} of config.json")

    def _specialize(self, layer: PackedLinear | PackedEmbedding, linear: PackedLinear) -> None:
        if not self._reference:
            before = linear.nbytes
            layer.specialize(self._spare)
            self._spare -= linear.nbytes - before

    def _schemes(self, module: str) -> tuple[Scheme | None, Scheme | None]:
        """Of the module's weight and of its input."""
        hit = self._checkpoint.recipe.rule_for(module) if module in self._checkpoint.tensors else None
        return (None, None) if hit is None else (hit[1].weight, hit[1].input)

    def _input(self, module: str) -> QuantizedInput | None:
        _, scheme = self._schemes(module)
        if scheme is None:
            return None
        names = {part.removeprefix("input_"): f"{module}.{part}" for part in input_parts(scheme)}
        self._left -= set(names.values())
        parts = {part: self._checkpoint.plain[name].to(self.device) for part, name in names.items()}
        return QuantizedInput(scheme, **parts)

    def _quantized(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor:
        tensor = self._checkpoint.tensors[name]
        self._left.discard(name)
        if tuple(tensor.shape) != shape:
            file = self._checkpoint.file(name)
            raise ValueError(f"{file}: tensor {name} is {tuple(tensor.shape)}; config.json asks for {shape}")
        return tensor.to(self.device)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if (module := name.removesuffix(".weight")) in self._checkpoint.tensors:
            raise ValueError(f"{self._checkpoint.file(module)}: {module} is quantized; it is served plain only")
        if name not in self._checkpoint.plain:
            raise ValueError(f"{self._checkpoint.path}: tensor {name} is missing; config.json asks for it")
        tensor = self._checkpoint.plain[name]
        self._left.discard(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in STORAGE:
            raise ValueError(
                f"{self._checkpoint.file(name)}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}; config.json "
                f"asks for {shape}, in float32, bfloat16 or float16"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{self._checkpoint.file(name)}: tensor {name} holds inf or NaN")
        return tensor.to(self.device)


def _alike(tensors: list[QuantizedTensor], inputs: list[QuantizedInput | None]) -> bool:
    """Whether weights of one scheme can be one weight: under one divisor, of an input rounded and ordered alike."""
    one, input = tensors[0], inputs[0]
    alike = all(_equal(t.global_scale, one.global_scale) and _equal(t.g_idx, one.g_idx) for t in tensors)
    return alike and (input is None or all(input.equals(other) for other in inputs))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _fuse(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """One tensor whose rows are those of all."""
    one = tensors[0]
    if len(tensors) == 1:
        return one
    zero_points = [t.zero_point for t in tensors if t.zero_point is not None]
    codes = torch.cat([t.codes for t in tensors])
    narrow = one.scale.dtype.itemsize == 1  # torch concatenates no powers of two
    scale = torch.cat([t.scale.view(torch.uint8) if narrow else t.scale for t in tensors]).view(one.scale.dtype)
    zero_point = torch.cat(zero_points) if zero_points else None
    return QuantizedTensor(codes, scale, zero_point, one.scheme, tuple(codes.shape), one.global_scale, one.g_idx)
