"""Block-AP (EfficientQAT, Chen et al., arXiv:2407.11062, section 3.2): train one decoder block at a time.

A block's inputs come from the quantized blocks before it, its targets from the full-precision model; weights, scales,
zero points and norms train together, for MSE(block_q(x_q), block_fp(x_fp)). What later blocks see is the block with its
dequantized codes, as it will be served.

Deviations: by default a token's error is relative to its target (`relative`), since the first token of a sequence is
so large in deep blocks that it alone would be nearly the whole of the paper's plain MSE; the loss is divided by where
it began, so that Adam's epsilon means the same in every block; scales are learned as logarithms, so `scale_lr` is
relative; batches hold the same sequences in every epoch, in another order.

For the paper's ablation of what trains, `round` keeps W within half a step of where it was: W + s V, |V| <= 0.5,
straight through, as SignRound has it (arXiv:2309.05516). V is no parameter of its own: W is projected into that box
after every step, which says the same, and `weights` and `round` then differ in the box alone.
"""

import copy
import hashlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PretrainedConfig, PreTrainedModel

from qat.models.families import structure_of
from qat.nn.embedding import QATEmbedding
from qat.nn.estimators import Estimator
from qat.nn.fake_quantize import kept
from qat.nn.linear import QATLinear
from qat.nn.observers.base import Observer
from qat.numerics.affine import group
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import is_input_scale
from qat.surgery.calibrate import calibrating, check_batches
from qat.surgery.changes import Changes
from qat.surgery.convert import convert, quantize_inputs
from qat.surgery.match import Plan, match
from qat.surgery.prepare import fake_quants, prepare
from qat.surgery.walk import Block, walk
from qat.training.graphed import GraphedLoss
from qat.training.optim import Optim
from qat.training.signed import signed

Trained = Literal["weights", "round", "scales", "zeros", "norms"]
FINAL = 0.05  # the cosine ends at lr / 20


@dataclass(frozen=True)
class BlockTraining:
    """How each block trains; attributes as the arguments of `blockwise`."""

    observer: Observer
    estimator: Estimator
    input_observer: Observer | None
    input_estimator: Estimator | None
    train: Sequence[Trained]
    relative: bool
    epochs: int
    lr: float | None
    scale_lr: float | None
    signed: bool
    seed: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if strays := sorted(set(self.train) - set(get_args(Trained))):
            raise ValueError(f"blockwise: train={strays[0]}; it takes {', '.join(get_args(Trained))}")
        if not self.train:
            raise ValueError("blockwise: train is empty, so nothing would be learned; use rtn")
        if {"weights", "round"} <= set(self.train):
            raise ValueError("blockwise: train has both weights and round, which keeps weights in place; choose one")
        if self.epochs < 1:
            raise ValueError(f"blockwise: epochs={self.epochs}; use 1 or more")
        for name in ("lr", "scale_lr"):
            rate = getattr(self, name)
            if rate is None and not self.signed:
                raise ValueError(f"blockwise: {name}=null has a meaning with signed=true only; give a number")
            if rate is not None and not (rate >= 0 and math.isfinite(rate)):
                raise ValueError(f"blockwise: {name}={rate}; a finite number, 0 or larger")


def blockwise(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    estimator: Estimator,
    input_observer: Observer | None = None,
    input_estimator: Estimator | None = None,
    train: Sequence[Trained] = ("weights", "scales", "zeros", "norms"),
    relative: bool = True,
    epochs: int = 2,
    batch_size: int = 2,
    lr: float | None = 5e-4,
    scale_lr: float | None = 5e-3,
    signed: bool = False,
    seed: int = 0,
    offload: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Trains block by block and converts each; a pure function of its arguments on one device.

    Costs `epochs` x forward and backward of every block over all batches, and memory for the model, one block with
    gradients and Adam's two moments, and two streams of hidden states. On a GPU steps are replayed as a CUDA graph.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        recipe: Module name to scheme.
        batches: Token ids, `[B, T]` each, of one length, without padding.
        observer: Where scales start.
        estimator: The gradient of rounding.
        input_observer: See `prepare`; static ranges of inputs are taken from the quantized stream, block by block.
        input_estimator: See `prepare`.
        train: What trains: `weights`, or `round` (within half a step); `scales` and `zeros`, where schemes have them
            and estimators learn them; `norms`, with whatever else in a block stays unquantized.
        relative: Whether the error of each token is divided by the mean square of its target; else the plain MSE.
        epochs: Passes over the batches.
        batch_size: Sequences for each optimizer step.
        lr: Learning rate of weights and norms; cosine to a twentieth, as are those of scales.
        scale_lr: Learning rate of the logarithms of scales, and of zero points.
        signed: Signed gradient descent in place of AdamW, as AutoRound (`signed.py`): `lr` is then in units of the
            quantization step, both rates fall to 0, and null is one over the number of steps.
        seed: Order of the batches, with block and epoch.
        offload: Whether hidden states wait on the CPU.
        dtype: Storage dtype of scales and norms.
        store: See `walk`.
        progress: See `walk`.

    Returns:
        Changes; `layers` has a row for each block with `initial` and `loss` (before and after), `steps`, `seconds`
        and `fallback` (None); `state` has the fp32 masters and scales, for training to go on (`surgery.start`).

    Raises:
        ValueError: The family is not known, the recipe does not fit or quantizes something outside of the blocks,
            arguments contradict each other, or the loss of a block stops being finite; finished blocks stay in `store`.
    """
    how = BlockTraining(
        observer,
        estimator,
        input_observer,
        input_estimator,
        tuple(train),
        relative,
        epochs,
        lr,
        scale_lr,
        signed,
        seed,
        dtype,
    )
    plan, blocks = match(model, recipe), structure_of(model.config.model_type).blocks
    for name, scheme in plan.quantized.items():
        if not name.startswith(f"{blocks}."):
            raise ValueError(f"{name}: block-wise training reaches {blocks} only; give it weight=null, or use init=mse")
        if "round" in train and not isinstance(scheme.grid, IntGrid):
            raise ValueError(f"{name}: train has round, which knows integer grids only, not {scheme}; use weights")
    if batch_size < 1:
        raise ValueError(f"blockwise: batch_size={batch_size}; use 1 or more")
    check_batches(batches)
    steps = list(torch.cat(batches).split(batch_size))

    def visit(block: Block) -> Changes:
        rules = _rules(block, plan)
        return train_block(block, Recipe(rules), model.config, how) if rules else Changes()

    return walk(model, steps, blocks, visit, True, recipe, store, progress, "outputs", offload)


def train_block(block: Block, recipe: Recipe, config: PretrainedConfig, how: BlockTraining) -> Changes:
    """Trains one block against its targets, and leaves what will be served of it in `block.module`."""
    start = time.monotonic()
    module = copy.deepcopy(block.module).float().requires_grad_(True)
    student = _at(block.name, module, config)
    inputs = (how.input_observer, how.input_estimator)
    prepare(student, recipe, how.observer, how.estimator, how.dtype, False, *inputs)
    with calibrating(student) as count:
        for index in range(len(block.inputs) if count else 0):
            _output(block, module, index)
    _select(student, how.train)
    initial = _mean_loss(block, module, how.relative)
    with torch.enable_grad():
        steps = _descend(block, student, max(initial, torch.finfo(torch.float32).tiny), how)
    loss = _mean_loss(block, module, how.relative)
    tensors, folded = convert(student)
    served = _at(block.name, block.module, config)
    for name, linear in fake_quants(student).items():
        weight = tensors[name].dequantize(torch.float32)
        same = torch.equal(linear.weight_fake_quant(linear.weight, torch.float32), weight)
        assert same, f"{name}: trained with other weights than its codes"
        served.get_parameter(f"{name}.weight").copy_(weight)
    for name, value in folded.items():
        if not is_input_scale(name):
            served.get_parameter(name).copy_(value)
    quantize_inputs(served, recipe, folded)
    state = {name: value.cpu() for name, value in student.state_dict().items()}
    seconds = time.monotonic() - start
    row = {"name": block.name, "initial": initial, "loss": loss, "steps": steps, "fallback": None, "seconds": seconds}
    return Changes(tensors, folded, [row], state)


def _descend(block: Block, student: nn.Module, scale: float, how: BlockTraining) -> int:
    """All optimizer steps of a block; how many there were."""
    module, batches = student.get_submodule(block.name), len(block.inputs)
    if how.signed:
        optimizer, schedule = signed(student, how.epochs * batches, how.lr, how.scale_lr)
    else:
        assert how.lr is not None
        assert how.scale_lr is not None
        optim = Optim(lr=how.lr, scale_lr=how.scale_lr, warmup=0.0, final=FINAL)
        optimizer, schedule = optim.build(student, how.epochs * batches)
    linears = fake_quants(student).values() if "round" in how.train else ()
    boxes = {linear: linear.weight.detach().clone() for linear in linears}
    loss_of = _losses(block, module, scale, how.relative)
    for epoch in range(how.epochs):
        losses = []
        for index in order(how.seed, block.name, epoch, batches):
            loss = loss_of(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            _box(boxes)
            losses.append(loss.detach())
        finite = torch.isfinite(torch.stack(losses))  # one look for each epoch: a GPU need not wait for the host
        if not bool(finite.all()):
            step = epoch * batches + int(finite.logical_not().nonzero()[0])
            raise ValueError(
                f"{block.name}: its loss is not finite at step {step} of block-wise training; the blocks before it are "
                f"kept. Lower lr or scale_lr and run again with resume=never"
            )
    return how.epochs * batches


@torch.no_grad()
def _box(boxes: dict[QATLinear | QATEmbedding, Tensor]) -> None:
    """Brings every weight back to within half a step, of its scale as it now is, of where it was."""
    for linear, centre in boxes.items():
        scale, _ = linear.weight_fake_quant.qparams()
        half, middle = scale.float().abs().unsqueeze(-1) / 2, group(centre, scale)
        inside = group(linear.weight, scale).clamp(middle - half, middle + half)
        linear.weight.copy_(inside.reshape(centre.shape))


def order(seed: int, block: str, epoch: int, batches: int) -> list[int]:
    """The order in which an epoch of a block takes its batches."""
    digest = hashlib.sha256(f"{seed} {block} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(batches, generator=generator).tolist()


def _output(block: Block, module: nn.Module, index: int) -> Tensor:
    """What a student makes of one batch; it runs in bf16 where the model does."""
    device = next(module.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=block.inputs[index].dtype == torch.bfloat16):
        return block.output(index, module)


def _loss(block: Block, module: nn.Module, index: int, relative: bool) -> Tensor:
    """Mean squared error of one batch, in fp32."""
    output = _output(block, module, index)
    wanted = block.full[index].to(output.device).float()
    error = (output.float() - wanted).square().mean(-1)
    if relative:
        error = error / (wanted.square().mean(-1) + torch.finfo(torch.float32).eps)
    return error.mean()


def _losses(block: Block, module: nn.Module, scale: float, relative: bool) -> Callable[[int], Tensor]:
    """What says the loss of a batch over `scale`, with its gradient; on a GPU a step is replayed (`graphed.py`).

    Replayed are the batches of the first one's shape. The others, such as a smaller last one, run as they are.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    first, spec = tree_flatten(block.kwargs[0])

    def eager(index: int) -> Tensor:
        return _loss(block, module, index, relative) / scale

    def tensors(index: int) -> list[Tensor]:
        values = (block.inputs[index], block.full[index], *tree_flatten(block.kwargs[index])[0])
        return [value.to(parameters[0].device) for value in values if isinstance(value, Tensor)]

    def step(hidden: Tensor, wanted: Tensor, *more: Tensor) -> dict[str, Tensor]:
        given = iter(more)
        kwargs = tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in first], spec)
        batch = Block(block.name, module, [hidden], [kwargs], block.original, [wanted])
        return {"loss": _loss(batch, module, 0, relative) / scale}

    if not _replays(parameters[0].device):
        return eager
    shapes, replayed = [value.shape for value in tensors(0)], GraphedLoss(step, parameters, *tensors(0))

    def loss_of(index: int) -> Tensor:
        values = tensors(index)
        return replayed(*values)["loss"] if [value.shape for value in values] == shapes else eager(index)

    return loss_of


def _replays(device: torch.device) -> bool:
    return device.type == "cuda"


def _mean_loss(block: Block, module: nn.Module, relative: bool) -> float:
    sizes = [target.numel() for target in block.full]
    with kept(module):
        losses = [_loss(block, module, index, relative) * size for index, size in enumerate(sizes)]
    return float(torch.stack(losses).double().sum()) / sum(sizes)


def _rules(block: Block, plan: Plan) -> dict[str, Rule]:
    """The plan of one block: a rule for each module, by its absolute name."""
    rows = [row for row in plan.rows if row.weight is not None and row.name.startswith(f"{block.name}.")]
    return {row.name: Rule(re.escape(row.name), row.weight, row.input) for row in rows}


def _at(path: str, module: nn.Module, config: PretrainedConfig) -> nn.Module:
    """A model of nothing but one block, in its place: its modules have their absolute names, and their family."""
    root = node = nn.Module()
    root.config = config
    *parents, last = path.split(".")
    for name in parents:
        node.add_module(name, nn.Module())
        node = node.get_submodule(name)
    node.add_module(last, module)
    return root


def _select(student: nn.Module, train: Sequence[Trained]) -> None:
    """Leaves a gradient to what trains.

    Raises:
        ValueError: That is nothing.
    """
    linears = fake_quants(student)
    for name, parameter in student.named_parameters():
        owner, _, key = name.rpartition(".")
        if owner in linears and key == "weight":
            trains = bool({"weights", "round"} & set(train))
        elif "_fake_quant." in name:
            trains = ("zeros" if "zero" in key else "scales") in train
        else:
            trains = "norms" in train
        parameter.requires_grad_(parameter.requires_grad and trains)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(f"blockwise: of train={list(train)} this recipe and estimator have nothing; add weights")
