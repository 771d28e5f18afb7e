"""The compiled library by ctypes: `native/abi.h` mirrored field by field, and the few functions it has."""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p, sizeof
from pathlib import Path

from torch import Tensor

MISSING = (
    "this installation has no compiled library: install a C++ compiler (g++ or clang++), then reinstall with "
    "`PLUGLM_NATIVE=1 pip install --force-reinstall --no-deps --no-binary :all: pluglm-executor-cpu`"
)
#: torch dtype names by the number the library knows them by.
DTYPES = {"float32": 0, "bfloat16": 1}
#: How a matrix of whole numbers of so many bits is laid out; one of plain numbers has its dtype's number.
PACKED_FORMS = {8: 2, 4: 3}
#: By number: of two that a machine has, the later is the better one.
ISAS = {"portable": 0, "avx2": 1, "avxvnni": 2, "avx512": 3, "avx512vnni": 4}
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5, "quick_gelu": 6}
NORMS = {"rms": 1, "layer": 2}
SCORINGS = {"softmax": 0, "softmax_topk": 1, "sigmoid": 2}
EMBED, NORMALISE, LINEAR, GATED, HEADS, ATTEND, LOGITS, CHOOSE, EXPERTS_IN, EXPERTS_OUT = range(10)
#: Most rows (B·T) of a pass that is no prompt.
MAX_ROWS = 16
#: Most rows of one call: prompts are cut into slices of so many. abi.h calls it MAX_ROWS.
SLICE_ROWS = 32
#: Most experts of one mixture.
MOST_EXPERTS = 1024
BAD_TOKEN, BAD_POSITION, NO_MEMORY = 1, 2, 3

_KINDS = {"p": c_void_p, "i": c_int64, "f": c_double}


def _fields(*groups: str) -> list[tuple[str, type]]:
    """ "p a b", "i c" -> pointers a and b, then the whole number c."""
    return [(name, _KINDS[kind]) for group in groups for kind, *names in [group.split()] for name in names]


class Norm(Structure):
    """A normalisation and the factor after it; see abi.h, as for the others."""

    _fields_ = _fields("p weight bias", "i kind size", "f eps scale")


class Matrix(Structure):
    """One weight in blocks of 16 rows."""

    _fields_ = _fields("p numbers scale offset bias", "i form rows columns at")


class Experts(Structure):
    """A mixture: how experts are chosen, and where it is written which."""

    _fields_ = _fields(
        "i count top_k scoring normalise num_groups top_k_groups gated inner", "f scale clamp alpha",
        "p correction weights chosen",
    )  # fmt: skip


class Op(Structure):
    """One operation on rows of float32."""

    _fields_ = [
        *_fields("i kind", "p src dst", "i src_row dst_row"), ("norm", Norm),
        *_fields(
            "p matrices", "i num_matrices packed", "p weight", "i dtype rows columns activation add",
            "f scale gate_scale clip softcap",
            "p positions_table", "i positions_rows position_offset slot num_heads num_kv_heads head_dim v_head_dim",
            "i appends norm_all rotation interleaved",
        ),
        ("q_norm", Norm), ("k_norm", Norm),
        *_fields("p sinks slopes", "i causal window chunk", "p gates", "i gates_row", "p experts"),
    ]  # fmt: skip


class Plan(Structure):
    """A model."""

    _fields_ = [("ops", POINTER(Op)), *_fields("i num_ops vocab_size logits_dtype scratch_rows rounds")]


class Slot(Structure):
    """Where one slot's keys and values lie."""

    _fields_ = _fields("p k v", "i k_row k_head k_cell v_row v_head v_cell dtype group")


class Group(Structure):
    """Which cells the slots of one geometry hand out in a pass."""

    _fields_ = _fields("i shift length start", "p positions", "i positions_row")


class Rotation(Structure):
    """cos and sin, by position or one row a token."""

    _fields_ = _fields("p cos sin", "i half positions row")


class Pass(Structure):
    """One pass."""

    _fields_ = _fields(
        "i B T keep", "p ids positions", "i ids_row ids_column positions_row positions_column",
        "p logits slots groups rotations", "i isa",
    )  # fmt: skip


class Run(Structure):
    """Several tokens of every row, and what has become of them."""

    _fields_ = _fields(
        "i count", "p tokens ended", "i pad", "p ends", "i num_ends num_groups", "p seeds", "i first", "f temperature",
        "i top_k", "f tail share", "i made fed", "f seconds",
    )  # fmt: skip


@functools.cache
def library() -> Library | None:
    """The library of this installation; None if it was built without, or lies there from another version."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    path = Path(__file__).with_name(f"libstep{suffix}")
    if not path.exists():
        return None
    loaded = ctypes.CDLL(str(path))
    loaded.pluglm_cpu_sizes.restype = c_int64
    return Library(loaded) if loaded.pluglm_cpu_sizes() == _sizes() else None


def _sizes() -> int:
    structs = (Norm, Matrix, Experts, Op, Plan, Slot, Group, Rotation, Pass, Run)
    total = 0
    for size in (*map(sizeof, structs), SLICE_ROWS):
        total = (total * 1009 + size) % 2**53
    return total


class Library:
    """Its functions. `step` and `decode` release the interpreter lock."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        loaded.pluglm_cpu_isas.restype = c_int64
        self._isas = int(loaded.pluglm_cpu_isas())
        self._pack = loaded.pluglm_cpu_pack
        self._pack.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p)
        self._pack.restype = None
        self.start, self.stop, self.step = loaded.pluglm_cpu_start, loaded.pluglm_cpu_stop, loaded.pluglm_cpu_step
        self.start.argtypes, self.start.restype = (c_int64,), c_void_p
        self.stop.argtypes, self.stop.restype = (c_void_p,), None
        self.step.argtypes, self.step.restype = (c_void_p, c_void_p, c_void_p), c_int64
        self.decode = loaded.pluglm_cpu_decode
        self.decode.argtypes, self.decode.restype = (c_void_p, c_void_p, c_void_p, c_void_p), c_int64

    @property
    def isas(self) -> list[str]:
        """Instruction sets that this machine has and the library has code for, plainest first."""
        return [name for name, number in ISAS.items() if self._isas >> number & 1]

    def pack(self, weight: Tensor, out: Tensor) -> None:
        """Lay out weight [rows, columns] as the blocks of `out`; see kernels.h."""
        dtype = DTYPES[str(weight.dtype).removeprefix("torch.")]
        rows, columns = weight.shape
        self._pack(weight.data_ptr(), dtype, rows, columns, weight.stride(0), out.data_ptr())
