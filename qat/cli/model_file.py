"""What a model's files say of it without torch: the context length and the shapes of its linears and embeddings.

Reads `config.json` and safetensors headers of a Hugging Face directory, or the header of a GGUF file. Weights are not
read. A directory without safetensors headers gives shapes only for configs that are written as Llama's.
"""

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

Shape = tuple[int, int]

GGUF_MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
STRING, ARRAY = 8, 9
GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}
HEADER_LIMIT = 2**27  # bytes; a longer header is no header


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is loaded.

    Attributes:
        context: The longest sequence that it was made for, in tokens; None if its files do not say.
        linears: Module name to (out-features, in-features); empty if its files do not say.
        embeddings: Module name to (entries, features); likewise.
    """

    context: int | None
    linears: dict[str, Shape]
    embeddings: dict[str, Shape] = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, Shape]:
        """Linears and embeddings together."""
        return self.linears | self.embeddings


def read_model(path: Path) -> ModelFacts:
    """The facts of a model directory or GGUF file.

    Raises:
        ValueError: It is missing, or no model.
    """
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a Hugging Face directory or a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise ValueError(f"{path} is no model: neither a directory nor a GGUF file")
        try:
            return _gguf(file)
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
            raise ValueError(f"{path} is damaged: its GGUF header cannot be read") from None


def _directory(path: Path) -> ModelFacts:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is no model: it holds no config.json") from None
    except ValueError:
        raise ValueError(f"{path}/config.json cannot be read as JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}/config.json holds no JSON object")
    files = sorted(path.glob("*.safetensors"))
    if not files and not list(path.glob("pytorch_model*.bin")):
        raise ValueError(f"{path} holds no weights (*.safetensors)")
    context = config.get("max_position_embeddings")
    found = dict(pair for file in files for pair in _safetensors(file).items()) or _from_config(config)
    return _facts(context, found)


def _facts(context: Any, matrices: dict[str, Shape]) -> ModelFacts:
    embeddings = {name: shape for name, shape in matrices.items() if "embed" in name}
    linears = {name: shape for name, shape in matrices.items() if name not in embeddings}
    return ModelFacts(context if isinstance(context, int) else None, linears, embeddings)


def _safetensors(path: Path) -> dict[str, Shape]:
    """Module name to shape of every two-dimensional weight of a file."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(size if size < HEADER_LIMIT else 0))
        shapes = {name: entry["shape"] for name, entry in header.items() if name.endswith(".weight")}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no safetensors file, or it is damaged") from None
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}


def _from_config(config: dict[str, Any]) -> dict[str, Shape]:
    """Shapes of the embedding and one decoder block from a config in Llama's words; empty for another."""
    hidden, inner, heads = (config.get(key, 0) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    if not all(isinstance(n, int) and n > 0 for n in (hidden, inner, heads)):
        return {}
    size = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * size
    block = {
        "self_attn.q_proj": (heads * size, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    entries = config.get("vocab_size")
    embedding = {"model.embed_tokens": (entries, hidden)} if isinstance(entries, int) and entries > 0 else {}
    return embedding | {f"model.layers.0.{name}": shape for name, shape in block.items()}


def _gguf(file: BinaryIO) -> ModelFacts:
    """GGUF 2 and 3, little-endian: counts, key-value pairs, then name, dimensions, type and offset of each tensor."""
    _, tensors, pairs = struct.unpack("<IQQ", file.read(20))
    metadata = {}
    for _ in range(pairs):
        key = _text(file)
        metadata[key] = _value(file, _number(file, "I"))
    matrices: dict[str, Shape] = {}
    for _ in range(tensors):
        name = _text(file)
        shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
        file.seek(12, 1)
        if module := _module(name):
            matrices[module] = (shape[1], shape[0])  # GGUF lists the fastest axis first
    return _facts(metadata.get(f"{metadata.get('general.architecture')}.context_length"), matrices)


def _module(name: str) -> str | None:
    """The Hugging Face module of a GGUF tensor, if it is a linear or an embedding."""
    if name in OUTER:
        return OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return f"model.layers.{match[1]}.{GGUF_NAMES[match[2]]}" if match and match[2] in GGUF_NAMES else None


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _text(file: BinaryIO) -> str:
    size = _number(file, "Q")
    if size > HEADER_LIMIT:
        raise OverflowError(size)
    return file.read(size).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    """A value; arrays are passed over (a vocabulary has tens of thousands of entries, of no use here)."""
    if kind == STRING:
        return _text(file)
    if kind != ARRAY:
        return _number(file, SCALARS[kind])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in SCALARS:
        file.seek(struct.calcsize(f"<{SCALARS[inner]}") * count, 1)
        return None
    for _ in range(count):
        if inner == STRING:
            file.seek(_number(file, "Q"), 1)
        else:
            _value(file, inner)
    return None
