"""Scheme: how ONE tensor is quantized. Torch-free."""

from dataclasses import dataclass, replace

from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, Grid, IntGrid

E4M3, E8M0 = "float8_e4m3fn", "float8_e8m0fnu"
SCALE_DTYPES = ("float32", "bfloat16", "float16", E4M3, E8M0)
CONVENTIONS = ("ct", "vllm", "signed")
INPUT_PARTS = ("input_scale", "input_zero_point", "input_global_scale")


@dataclass(frozen=True)
class Scheme:
    """A grid, the elements that share a scale, and how the scale follows from their range.

    Attributes:
        grid: The levels.
        granularity: Which elements share a scale.
        symmetric: Zero is code 0 and no zero point is stored; else an integer zero point goes with every scale.
        dynamic: The scale is computed from each tensor as it comes (activations) and never stored.
        scale_dtype: Name of the dtype that the scale is stored in; None means the storage dtype of the export.
            `float8_e4m3fn` brings a second, per-tensor fp32 scale (NVFP4); `float8_e8m0fnu` has powers of two (MX).
        convention: How a symmetric integer scale follows from absmax; `ct`, as compressed-tensors has it:
            `absmax / ((2**bits - 1) / 2)`; `vllm`, as its dynamic activations have it: `absmax / (2**(bits-1) - 1)`;
            `signed`, as auto-round and GGUF have it: `absmax / 2**(bits-1)`, negative where the largest magnitude is
            a positive number, so that the code -2**(bits-1) always stands at the longer end, and a step is the shortest
            of the three. Where there is a zero point, or no integer grid, `signed` has no meaning and is `ct`.

    Raises:
        ValueError: A combination that means nothing.
    """

    grid: Grid
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: str | None = None
    convention: str = "ct"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, IntGrid | FloatGrid | Codebook):
            raise ValueError(f"grid={self.grid!r}: expected an IntGrid, a FloatGrid or a Codebook")
        if not isinstance(self.granularity, PerTensor | PerChannel | PerGroup | PerToken):
            raise ValueError(f"granularity={self.granularity!r}: expected PerTensor, PerChannel, PerGroup or PerToken")
        if isinstance(self.grid, IntGrid) and self.grid.bits < 2:
            raise ValueError(
                "bits=1: a two's complement bit has the levels -1 and 0; a scheme needs 2 bits or more, or the "
                "Codebook binary"
            )
        if not isinstance(self.grid, IntGrid) and not self.symmetric:
            raise ValueError(f"symmetric=false with grid {self.grid}: only integer grids have a zero point")
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r}: one of {', '.join(SCALE_DTYPES)}, or null")
        self._check_convention()
        if self.scale_dtype in (E4M3, E8M0) and not isinstance(self.grid, FloatGrid):
            raise ValueError(f"scale_dtype={self.scale_dtype!r} goes with a FloatGrid, not with {self.grid}")
        if self.two_level and not isinstance(self.granularity, PerGroup):
            raise ValueError(f"scale_dtype={E4M3!r} goes with PerGroup: a per-tensor scale is its second level")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise ValueError("granularity=PerToken needs dynamic=true: tokens are not known before they come")

    def _check_convention(self) -> None:
        meant = self.symmetric and isinstance(self.grid, IntGrid)
        if self.convention == "signed" and not meant:
            object.__setattr__(self, "convention", "ct")  # so that a recipe of signed scales may be given another grid
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention={self.convention!r}: one of {', '.join(CONVENTIONS)}")
        if self.convention == "vllm" and not meant:
            raise ValueError("convention='vllm' is about symmetric integer grids; use ct")
        if self.convention == "signed" and self.dynamic:
            raise ValueError("convention='signed' with dynamic=true: kernels take scales of activations as positive")

    @property
    def two_level(self) -> bool:
        """Whether a second, per-tensor scale divides the scales of the groups."""
        return self.scale_dtype == E4M3

    def __str__(self) -> str:
        size = f"_g{self.granularity.group_size}" if isinstance(self.granularity, PerGroup) else ""
        name = "" if size else "_" + type(self.granularity).__name__.removeprefix("Per").lower()
        scale = {E4M3: "_e4m3", E8M0: "_e8m0"}.get(self.scale_dtype or "", "")
        zero = {(True, "signed"): "_signed", (False, "ct"): "_asym"}.get((self.symmetric, self.convention), "")
        return f"{self.grid}{size}{name}{scale}{zero}{'_dynamic' if self.dynamic else ''}"


def integers(scheme: Scheme) -> Scheme:
    """The scheme whose integer grid holds the levels of a codebook of integers; any other scheme as it is."""
    if isinstance(scheme.grid, Codebook) and (bits := scheme.grid.integer_bits) is not None:
        return replace(scheme, grid=IntGrid(bits))
    return scheme


def input_parts(scheme: Scheme | None) -> tuple[str, ...]:
    """What is stored, as `<module>.<part>`, of an input with this scheme: nothing where all of it comes with x."""
    if scheme is None or (scheme.dynamic and not scheme.two_level):
        return ()
    if scheme.dynamic:
        return INPUT_PARTS[2:]
    return INPUT_PARTS[:1] if scheme.symmetric else INPUT_PARTS[:2]


def is_input_scale(name: str) -> bool:
    """Whether a tensor of this name belongs to a calibrated input, and is no parameter of the model."""
    return name.rpartition(".")[2] in INPUT_PARTS
