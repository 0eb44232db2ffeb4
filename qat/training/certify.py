"""From a trained student to integers, with the evidence that they are what training computed with."""

import torch
from torch import Tensor

from qat.kernels.fake_quant import watch
from qat.nn.embedding import QATEmbedding
from qat.nn.linear import QATLinear
from qat.surgery.convert import Folded, Tensors, convert
from qat.surgery.prepare import fake_quants
from qat.training.module import QATModule


@torch.no_grad()
def certify(
    module: QATModule, prompts: list[Tensor], precision: str, shape: tuple[int, int] | None = None
) -> tuple[Tensors, Folded, dict[str, object]]:
    """Converts, and holds the codes to what the training graph computes, bit for bit.

    The graph runs the prompts once more as in training: training mode, the same autocast, compiled if it was. Every
    fake-quantized weight that passes is compared, in the dtype in which it passes, with the dequantized codes; of an
    embedding, the rows that are looked up. An embedding and the head that is tied to it are two modules with one name
    for their codes: each has to pass. A CUDA graph, which shows no weights, was held to the same functions when
    training ended (`GraphedLoss.check`).

    Args:
        module: After its last optimizer step.
        prompts: Token ids, `[1, T]` each.
        precision: Lightning's name of the precision that training ran in.
        shape: Sequences and tokens of a training batch, which the prompts then fill, for a compiled graph: another
            shape would be another compilation.

    Returns:
        The pair of `convert`, and `{"modules", "equal", "dtype"}` for the certificate; with `"replayed": True` where
        training was.

    Raises:
        ValueError: A weight is not finite (`convert`).
        AssertionError: Training computed with something other than the codes. This is a bug, not a user's mistake.
    """
    student = module.student
    linears = fake_quants(student)
    module.as_served()
    tensors, folded = convert(student)
    names = {linear.weight_fake_quant.scale.data_ptr(): name for name, linear in linears.items()}
    modules = (m for m in student.modules() if isinstance(m, QATLinear | QATEmbedding))
    uses = {(names[m.weight_fake_quant.scale.data_ptr()], isinstance(m, QATEmbedding)) for m in modules}
    seen: dict[tuple[str, bool], torch.dtype] = {}  # (name, whether it is a lookup)

    def compare(scale: Tensor, result: Tensor, rows: Tensor | None) -> None:
        name = names.get(scale.data_ptr())
        if name is None:
            return  # an activation
        expected = tensors[name].dequantize(result.dtype)
        expected = expected if rows is None else expected[rows]
        assert torch.equal(_bits(result), _bits(expected)), (
            f"{name}: training computed with other weights than its codes"
        )
        seen[name, rows is not None] = result.dtype

    student.train()
    device = linears[next(iter(linears))].weight.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))
    with watch(compare), autocast:
        for prompt in prompts if shape is None else [filled(prompts, shape)]:
            module.forward_student(prompt.to(device))
    assert {name for name, _ in uses} == set(tensors), "a quantized tensor belongs to no module"
    if lost := sorted(uses - set(seen)):
        name, lookup = lost[0]
        raise AssertionError(f"{name}: training does not {'look anything up in' if lookup else 'compute with'} it")
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in seen.values()})
    evidence: dict[str, object] = {"modules": len(uses), "equal": len(seen), "dtype": ", ".join(dtypes)}
    return tensors, folded, evidence | ({"replayed": True} if module.replayed else {})


def filled(prompts: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """The prompts one after another, over and over, as one batch of token ids."""
    ids, size = torch.cat([prompt.flatten() for prompt in prompts]), shape[0] * shape[1]
    return ids.repeat(-(-size // len(ids)))[:size].reshape(shape)


def _bits(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])
