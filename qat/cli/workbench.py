"""What every verb that makes a checkpoint needs first: device, model, tokens, recipe, run directory."""

import copy
import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from pytorch_lightning import seed_everything
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.cli.devices import by_device
from qat.cli.rundir import RunDir
from qat.cli.serving import check, reorders
from qat.data.calibration import calibration
from qat.data.text import Tokens, prepare
from qat.engine.loader import ARCHITECTURES, FORMATS
from qat.formats import gguf
from qat.formats.base import digest
from qat.formats.targets import Layer
from qat.models import hf
from qat.nn.kv import check_kv
from qat.numerics.recipe import Recipe
from qat.surgery.convert import apply
from qat.surgery.match import Plan, match
from qat.surgery.rotate import check_stream


@dataclass(frozen=True)
class Workbench:
    """Everything that an arm works on; nothing on it changes while arms come and go.

    Attributes:
        config: The resolved config.
        run: The run directory.
        device: Where arms compute.
        dtype: Storage dtype of the export.
        model: Full precision: fp32 parameters with values of the storage dtype, on the CPU.
        tokenizer: Its tokenizer.
        tokens: Prepared data.
        recipe: Module name to scheme.
        plan: The recipe on this model.
        windows: What arms are judged on: windows of the test split, as a rule; int64 `[n, seq_len]`.
        calibration: Calibration batches, of the train split.
    """

    config: dict[str, Any]
    run: RunDir
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens
    recipe: Recipe
    plan: Plan
    windows: Tensor
    calibration: list[Tensor]

    @cached_property
    def judged(self) -> PreTrainedModel:
        """The full-precision model as arms are judged: fp32 on the CPU, bf16 parameters on a GPU."""
        if self.device.type == "cpu":
            return self.model
        return cast(apply(self.model, {}, {}), torch.bfloat16).to(self.device)

    @cached_property
    def prompts(self) -> list[Tensor]:
        """The certificate's prompts as token ids."""
        return [torch.tensor(self.tokenizer(p, add_special_tokens=False)["input_ids"]) for p in self.config["prompts"]]

    def moved(self, graph: PreTrainedModel) -> PreTrainedModel:
        """A graph on the device; one that shares parameters with the model leaves the model's where they are."""
        return graph if self.device.type == "cpu" else copy.deepcopy(graph).to(self.device)

    def build(self, *keys: str, **more: Any) -> Any:
        """What a node of the config instantiates."""
        node: Any = self.config
        for key in keys:
            node = node[key]
        return instantiate(node, _convert_="all", **more)


def quiet() -> None:
    """Third parties speak only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("pytorch_lightning", "lightning.pytorch", "transformers", "datasets", "compressed_tensors"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|torch\.utils")


def pick_device(wanted: str) -> torch.device:
    """The device to compute on.

    Raises:
        ValueError: A GPU is asked for and there is none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu")
    return device


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Parameters in `dtype`; buffers, such as rotary frequencies, keep theirs."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(parameter.to(dtype), requires_grad=False)
    model.tie_weights()
    return model


def open_workbench(config: dict[str, Any], run: RunDir | None = None, split: str = "test") -> Workbench:
    """Loads everything, and opens the run directory once nothing can be wrong any more.

    Args:
        config: A composed config.
        run: The run directory, where it is known already and stays as it is; None: found or made as `resume` says.
        split: Where the windows are from that arms are judged on.

    Raises:
        ValueError: Model, data, recipe and sizes do not fit each other; names the setting to change.
    """
    quiet()
    device = pick_device(config["device"])
    config = by_device(config, device.type)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    seed_everything(config["seed"], verbose=False)
    dtype = getattr(torch, config["export"]["dtype"])
    recipe: Recipe = instantiate(config["recipe"], _convert_="all")
    named = config["model"]
    model, tokenizer = hf.load(**named, dtype=dtype)
    plan = match(model, recipe)
    _check_model(model, plan, recipe, config)
    test, calib = config["evaluation"], config["calibration"]
    limit = model.config.max_position_embeddings
    for key in ("data", "calibration", "evaluation"):
        if config[key]["seq_len"] > limit:
            raise ValueError(f"{key}.seq_len={config[key]['seq_len']}: the model takes {limit} tokens at most")
    tokens = prepare(
        instantiate(config["data"]["source"], _convert_="all"),
        tokenizer,
        hf.cache_dir() / "tokens",
        config["data"]["path"],
        config["data"]["extra"],
    )
    if config["format"]["name"] != "none":
        check_servable(model, tokenizer, config)
    windows = tokens.windows(split, test["seq_len"], test["windows"])
    batches = calibration(tokens, calib["samples"], calib["seq_len"], calib["batch_size"], calib["seed"])
    known = run is not None
    run = run or RunDir.open(config)
    bench = Workbench(config, run, device, dtype, model, tokenizer, tokens, recipe, plan, windows, batches)
    facts: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": config["seed"],
        "data": {"path": str(tokens.path), "fingerprint": tokens.fingerprint},
        "model": {"fingerprint": fingerprint(model, dtype)},
    }
    for what in ("data", "model"):  # names and paths may be the same, and what lies there another
        was = (run.facts.get(what) or {}).get("fingerprint")
        if was not in (None, facts[what]["fingerprint"]):
            raise ValueError(
                f"{run.path}: this run began with another {what}, under the same name ({was[:12]}, now "
                f"{facts[what]['fingerprint'][:12]}); start a new one with resume=never"
            )
    if not known:
        run.start(config, facts)
    return bench


def _check_model(model: PreTrainedModel, plan: Plan, recipe: Recipe, config: dict[str, Any]) -> None:
    """What format, target, recipe and methods ask of the model, before anything is computed.

    Raises:
        ValueError: It is not what they ask for.
    """
    for row in plan.rows:
        if row.weight is not None and (name := config["format"]["name"]) != "none":
            FORMATS[name].check_scheme(row.name, row.weight, row.input, row.kind)
    check(config, linears(plan, config), recipe.kv)
    if config["format"]["name"] == "gguf":
        gguf.check_model(model)
    if recipe.kv is not None:
        check_kv(model, recipe.kv)
    if _rotates_stream({key: config.get(key) for key in ("arms", "method", "init", "adapter")}):
        check_stream(model)


def _rotates_stream(node: Any) -> bool:
    """Whether a method, in whatever place, rotates the residual stream."""
    if not isinstance(node, Mapping):
        return False
    mine = node.get("_target_") == "qat.ptq.rotate.rotate" and node.get("residual", True)
    return mine or any(_rotates_stream(value) for value in node.values())


def linears(plan: Plan, config: Mapping[str, Any]) -> list[Layer]:
    """The linears of a plan, as those who load an export see them."""
    rows = [row for row in plan.rows if row.kind != "Embedding" and len(row.shape) == 2]
    return [Layer(row.name, (row.shape[0], row.shape[1]), row.weight, row.input, reorders(config)) for row in rows]


def check_servable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> None:
    """What the certificate will need of the engine, before hours of training.

    Raises:
        ValueError: The engine does not serve the family, or a prompt and its continuation are too long.
    """
    if (name := type(model).__name__) not in ARCHITECTURES:
        served = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"model: the engine does not serve {name}, so no export of it can be verified; it has {served}"
        )
    longest = max(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in config["prompts"])
    needed, limit = longest + config["certificate"]["new_tokens"], model.config.max_position_embeddings
    if needed > limit:
        raise ValueError(f"certificate.new_tokens: with the longest prompt {needed} tokens; the model takes {limit}")


def fingerprint(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """SHA-256 over the parameters, in the storage dtype that they are rounded to."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(f"{name} {digest(parameter.to(dtype))} ".encode())
    return sha.hexdigest()


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
