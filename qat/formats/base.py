"""What every checkpoint format shares: a complete Hugging Face directory, digests, and reading that trusts nothing.

A checkpoint is read lazily, one tensor at a time, so that an engine never holds more than it serves. Only safetensors
and JSON are read; nothing is unpickled.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.numerics.affine import scale_dtype
from qat.numerics.qtensor import QuantizedTensor, as_integers
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme, integers, is_input_scale

INDEX = "model.safetensors.index.json"
CERTIFICATE = "verify.json"
PARTS = ("codes", "scale", "zero_point", "global_scale", "g_idx")  # of a quantized weight
METADATA = {"format": "pt"}
STORED = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
}
ORDER = list(STORED)  # safetensors lays tensors out from the last of these dtypes to the first, then by name
T = TypeVar("T")


class Lazy(Mapping[str, T], Generic[T]):
    """Names known at once, values read when asked for."""

    def __init__(self, names: list[str], read: Callable[[str], T]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened.

    Attributes:
        path: Its directory.
        config: `config.json` as it stands.
        recipe: One rule for each scheme in the file; empty for a plain checkpoint.
        tensors: Module name to its quantized weight.
        plain: Parameter name to its unquantized tensor.
        files: Name of every tensor on disk, which begins with its module's or parameter's, to the file that holds it.
    """

    path: Path
    config: dict[str, Any]
    recipe: Recipe
    tensors: Mapping[str, QuantizedTensor]
    plain: Mapping[str, Tensor]
    files: Mapping[str, Path]

    def file(self, name: str) -> Path:
        """The file that holds a module's or a parameter's tensors; the directory, if none does."""
        return next((f for n, f in self.files.items() if n == name or n.startswith(f"{name}.")), self.path)


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a tensor."""
    data = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
    sha.update(data.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def certified_parts(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized weight's parts, keyed `<module>.codes`, `.scale` and, where it has one, `.zero_point` and so on."""
    parts = {part: getattr(tensor, part) for part in PARTS}
    return {f"{name}.{part}": value for part, value in parts.items() if value is not None}


def quantized_digests(name: str, tensor: QuantizedTensor) -> dict[str, str]:
    """Digests of a quantized weight's parts."""
    return {key: digest(value) for key, value in certified_parts(name, tensor).items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: The file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint directory holds it") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it, shards included.

    Raises:
        ValueError: A file is missing, truncated or no safetensors file, or the index and the shards disagree.
    """
    index = path / INDEX
    indexed = _strings(index, "weight_map") if index.exists() else None
    shards = ["model.safetensors"] if indexed is None else sorted(set(indexed.values()))
    where: dict[str, Path] = {}
    for shard in shards:
        file = path / shard
        if file.parent != path or not file.is_file():
            raise ValueError(f"{file}: no such file; the checkpoint is incomplete")
        try:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from None
        if indexed is not None and (strays := sorted(name for name in names if indexed.get(name) != shard)):
            raise ValueError(f"{index}: the index and the shards disagree about {strays[0]}")
        where.update(dict.fromkeys(names, file))
    if indexed is not None and (lost := sorted(set(indexed) - set(where))):
        raise ValueError(f"{index}: the index and the shards disagree about {lost[0]}")
    return where


def _strings(file: Path, key: str) -> dict[str, str]:
    """An object of strings out of a JSON file; never empty, since an empty one would let everything pass."""
    value = read_json(file).get(key)
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) for v in value.values()):
        raise ValueError(f"{file}: {key} must be an object of strings, and not empty; the file is damaged")
    return value


class Certified:
    """The digests that a directory's certificate has of its tensors; none, where none lies beside them."""

    def __init__(self, path: Path):
        certificate = path / CERTIFICATE
        certified = certificate.exists() and "sha256" in read_json(certificate)
        self._digests = _strings(certificate, "sha256") if certified else {}

    def check(self, parts: Mapping[str, Tensor], file: Path) -> None:
        """Raises ValueError naming part and file if a part of a module is not what the certificate says, or is gone."""
        for key, tensor in parts.items():
            if self._digests and self._digests.get(key) != digest(tensor):
                raise ValueError(f"{file}: {key} is not what {CERTIFICATE} certifies; the file was changed")
        modules = [key.removesuffix(".codes") for key in parts if key.endswith(".codes")]
        whole = {f"{module}.{part}" for module in modules for part in PARTS}
        if lost := sorted(self._digests.keys() & whole - parts.keys()):  # without it the file reads as another weight
            raise ValueError(f"{file}: {lost[0]} is missing, of which {CERTIFICATE} speaks; the file was changed")


class Reader:
    """Reads single tensors of a checkpoint and holds them to the certificate's digests, where one lies beside them."""

    def __init__(self, path: Path):
        self.path, self.files = path, tensor_files(path)
        self._certified = Certified(path)
        self._open = functools.cache(lambda file: safe_open(file, framework="pt"))  # opening parses the whole header

    def raw(self, name: str) -> Tensor:
        """The tensor of this name as the file has it."""
        if name not in self.files:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        return self._open(self.files[name]).get_tensor(name)

    def dtype(self, name: str) -> str:
        """The stored dtype of a tensor, by its torch name, read from the header alone."""
        stored = self._open(self.files[name]).get_slice(name).get_dtype()
        return next((str(dtype).removeprefix("torch.") for dtype, name in STORED.items() if name == stored), stored)

    def plain(self, name: str) -> Tensor:
        """An unquantized tensor, checked."""
        tensor = self.raw(name)
        self.check({name: tensor}, name)
        return tensor

    def check(self, parts: dict[str, Tensor], name: str) -> None:
        """Raises ValueError naming tensor and file if a part is not what the certificate says."""
        self._certified.check(parts, next((f for n, f in self.files.items() if n.startswith(name)), self.path))


def packed_modules(reader: Reader, parts: tuple[str, ...]) -> list[str]:
    """Modules that are stored as these parts, the first of which marks them.

    Raises:
        ValueError: A part is missing, or belongs to no module; or a module has another weight; or there is none at all.
    """
    modules = [name.removesuffix(f".{parts[0]}") for name in reader.files if name.endswith(f".{parts[0]}")]
    whole = {f"{module}.{part}" for module in modules for part in parts}
    if strays := [n for n in reader.files if n.rpartition(".")[2] in parts and n not in whole]:
        raise ValueError(f"{reader.files[strays[0]]}: tensor {strays[0]} belongs to no quantized module")
    if lost := sorted(whole - set(reader.files)):
        raise ValueError(f"{reader.path}: tensor {lost[0]} is missing")
    if not modules:
        raise ValueError(f"{reader.path}: config.json says quantized, but no tensor ends in {parts[0]}")
    for module in modules:
        check_only_weight(reader, module)
    return modules


def check_only_weight(reader: Reader, module: str) -> None:
    """Raises ValueError if a packed module has a plain weight beside its parts: readers would differ in which is it."""
    if (name := f"{module}.weight") in reader.files:
        raise ValueError(f"{reader.files[name]}: tensor {name} lies beside the packed weight of {module}; delete one")


def load_plain(path: Path | str) -> Checkpoint:
    """Opens an unquantized Hugging Face checkpoint directory.

    Raises:
        ValueError: It is incomplete, damaged or quantized.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    if (method := (config.get("quantization_config") or {}).get("quant_method")) is not None:
        raise ValueError(f"{path}: a checkpoint quantized by {method!r}, not a plain one")
    reader = Reader(path)
    return Checkpoint(path, config, Recipe({}), {}, Lazy(list(reader.files), reader.plain), reader.files)


def recipe_of(schemes: Mapping[str, tuple[Scheme, Scheme | None]], kv: Scheme | None = None) -> Recipe:
    """The recipe of a file: one rule for each pair of weight and input scheme, which names its modules."""
    by_schemes: dict[tuple[Scheme, Scheme | None], list[str]] = {}
    for name, pair in schemes.items():
        by_schemes.setdefault(pair, []).append(name)
    rules = {}
    for i, ((weight, input), names) in enumerate(by_schemes.items()):  # short names leave some of a scheme out
        rules[f"{i}_{weight}"] = Rule("|".join(re.escape(name) for name in names), weight, input)
    return Recipe(rules, kv)


def expressed(recipe: Recipe, tensors: Mapping[str, QuantizedTensor]) -> tuple[Recipe, dict[str, QuantizedTensor]]:
    """Recipe and tensors as formats of integers say them: codebooks of integers on the grid that holds their levels."""
    rules = {
        key: replace(rule, weight=None if rule.weight is None else integers(rule.weight))
        for key, rule in recipe.rules.items()
    }
    return replace(recipe, rules=rules), {name: as_integers(tensor) for name, tensor in tensors.items()}


def check_tensors(
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    check_scheme: Callable[[str, Scheme, Scheme | None, str], None],
    dtype: torch.dtype,
) -> None:
    """Raises ValueError, naming the module, if a tensor is not what its rule says, or not what a format carries."""
    for name, tensor in tensors.items():
        hit = recipe.rule_for(name)
        if hit is None or hit[1].weight != tensor.scheme:
            raise ValueError(f"{name}: quantized as {tensor.scheme}, but the recipe says {hit and hit[1].weight}")
        check_scheme(name, tensor.scheme, hit[1].input, type(model.get_submodule(name)).__name__)
        if tensor.scale.dtype != scale_dtype(tensor.scheme, dtype):
            raise ValueError(f"{name}: scale in {tensor.scale.dtype}, but the storage dtype is {dtype}")


def unquantized_state(
    model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor], folded: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor of the file that is not quantized, in the storage dtype: `folded` wins over the model's own.

    Tied tensors appear once, under the name that the model ties to. Scales of inputs, which `folded` alone has, keep
    the dtype that they were found in.

    Raises:
        ValueError: A tensor is not representable in `dtype`, is not finite, or `folded` names none of the model's.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {k: v for k, v in model.state_dict().items() if k not in tied}
    inputs = {k: v for k, v in folded.items() if is_input_scale(k) and k.rpartition(".")[0] in tensors}
    if strays := sorted(set(folded) - set(state) - set(inputs)):
        raise ValueError(f"{strays[0]}: a changed tensor that the model does not have")
    quantized = {f"{name}.weight" for name in tensors}
    if strays := sorted(quantized - set(state)):
        raise ValueError(f"{strays[0]}: quantized, but the model has no such tensor of its own (tied to another?)")
    result = {}
    for name, own in state.items():
        if name in quantized:
            continue
        value = folded.get(name, own).detach()
        if value.is_floating_point():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: not finite; the model is damaged")
            stored = value.to(dtype)
            if not torch.equal(stored.to(value.dtype), value):
                raise ValueError(f"{name}: holds values beyond {dtype}; round the model to the storage dtype first")
            value = stored
        result[name] = value.cpu().contiguous()
    for name, value in inputs.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: not finite; calibrate again")
        result[name] = value.detach().cpu().contiguous()
    return result


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the tensors into a directory."""
    save_torch_state_dict(dict(state), path, metadata=METADATA, max_shard_size="50GB")
    for file in path.glob("*.safetensors"):
        file.chmod(path.stat().st_mode & 0o666)  # safetensors lets only the owner read


def write_directory(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    state: Mapping[str, Tensor],
    quantization_config: dict[str, Any] | None,
    dtype: torch.dtype,
    write: Callable[[Path, Mapping[str, Tensor]], None] = write_safetensors,
) -> None:
    """Writes config, generation config, tokenizer (chat template included) and tensors; whole or not at all."""
    if path.exists() and any(path.iterdir()) and not (path / CERTIFICATE).is_file():
        raise ValueError(f"{path}: holds something other than an earlier export; name an empty or new directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization_config is not None:
        config.quantization_config = quantization_config
    config.save_pretrained(part)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    write(part, state)
    (part / CERTIFICATE).write_text('{"verified": false}', encoding="utf-8")  # until one is issued
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of the safetensors file that `write_directory` makes of these tensors, if it fits one shard."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in sorted(state, key=lambda n: (-ORDER.index(state[n].dtype), n)):
        begin, end = end, end + state[name].numel() * state[name].element_size()
        header[name] = {"dtype": STORED[state[name].dtype], "shape": [*state[name].shape], "data_offsets": [begin, end]}
    size = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-size // 8) * 8 + end


def linear_names(model: nn.Module) -> list[str]:
    """Names of all `nn.Linear` modules: what formats that target by class need for their ignore list."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
