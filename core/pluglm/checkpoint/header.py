"""The header of a safetensors file: read and checked in full before a byte of weights is touched.

A file is `u64 little-endian header length`, a JSON object, then the data. The checks are those of the reference
implementation (safetensors 0.8) and some stricter ones: no duplicate keys, no unknown fields, no control characters in
names, no dimension above 2**40. Nothing is allocated by what the header says, only by how many bytes it has.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pluglm.checkpoint.strict_json import JsonError, collector_paused, parse_object
from pluglm.errors import CheckpointError, ModelNotFoundError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
_MAX_DIM = 2**40
_MAX_RANK = 64
_FIELDS = {"dtype", "shape", "data_offsets"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_AGAIN = "Download or copy the file again; if it is still refused, ask the author of the checkpoint to save it anew."
_CONVERT = (
    "Use a safetensors version of the checkpoint, or convert it in a sandbox you trust "
    "(load it there and save it with safetensors.torch.save_file)."
)

# Bits for one element of each dtype that the format defines.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class TensorInfo(NamedTuple):
    """One tensor: dtype as the file spells it, shape, and its bytes [start, end) counted from the data's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: name → TensorInfo, in the order of the data.
        metadata: the file's free text entries.
        data_offset: bytes before the first tensor.
        file_bytes: size of the whole file, which the tensors cover without a hole.
        digest: sha256 of the header, hex.
        identity: (device, inode, mtime in ns, size) of the file that was read, to notice a swap later.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_offset: int
    file_bytes: int
    digest: str
    identity: tuple[int, int, int, int]


def file_identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one version of a file from another without reading it."""
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError if the file's name is one that pickled weights have."""
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _wrong(
            path,
            f'"{path}" is a pickled checkpoint.',
            f"Expected a .safetensors file, found {path.suffix}: loading a pickle can run any code of its author.",
            fix=_CONVERT,
        )


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises: CheckpointError with `.path` (and `.tensor` where one tensor is at fault) naming what was expected and
    found; ModelNotFoundError if there is no such file.
    """
    path = Path(path)
    refuse_pickle(path)
    with collector_paused():
        return _read(path)


def _read(path: Path) -> Header:
    raw, found = _read_raw(path)
    try:
        entries = parse_object(raw)
    except JsonError as e:
        raise _damaged(path, f"its header must be one JSON object; found: {e}") from e
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    data_offset = 8 + len(raw)
    tensors = {name: _tensor(path, name, entry) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(path, ordered, found.st_size - data_offset)
    return Header(ordered, metadata, data_offset, found.st_size, hashlib.sha256(raw).hexdigest(), file_identity(found))


def _read_raw(path: Path) -> tuple[bytes, os.stat_result]:
    """The header's bytes and the file's stat, after every check that needs no JSON."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open, which would wait on a named pipe
            raise _damaged(path, "expected a file, found a folder or a device")
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            start = file.read(16)
            _check_magic(path, start)
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"expected a header of at most {MAX_HEADER_BYTES:,} bytes, found {length:,}")
            if 8 + length > found.st_size:
                raise _damaged(
                    path, f"expected at least {8 + length:,} bytes (its header), found {found.st_size:,}: truncated"
                )
            file.seek(8)
            raw = file.read(length)
    except FileNotFoundError as e:
        raise ModelNotFoundError(
            f'There is no file "{path}".',
            why="Expected a safetensors file, found nothing under that name.",
            fix="Check the spelling, or download the model again.",
            model=str(path),
            path=str(path),
        ) from e
    except OSError as e:
        why = e.strerror or str(e)
        raise _wrong(path, f'"{path}" cannot be read.', f"{why}.", fix="Check the file's permissions.") from e
    if len(raw) != length:
        raise _damaged(path, f"expected {length:,} header bytes, found {len(raw):,}: the file shrank while it was read")
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise _damaged(path, f"expected at most {MAX_TENSORS:,} tensors, found more")
    return raw, found


def _check_magic(path: Path, start: bytes) -> None:
    """Name the usual strangers that carry a .safetensors name. A real file has `{` as its ninth byte."""
    if len(start) >= 9 and start[8:9] == b"{" and start[4:8] == b"\0\0\0\0":
        return  # a header length whose bytes happen to look like a pickle's first two is no pickle
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05"):
        raise _wrong(
            path,
            f'"{path}" holds a pickle under another name.',
            "Expected safetensors, found the first bytes of a pickle, which can run any code of its author.",
            fix=_CONVERT,
        )
    strangers = {
        b"version https://": ("a Git LFS pointer, not the weights", "Run `git lfs pull` in that folder."),
        b"GGUF": ("a GGUF file", "Install a plugin of kind `format` that reads GGUF and load the file with it."),
        b"<": ("an HTML or XML page", "Download the file again; the server answered with a web page."),
    }
    for magic, (what, fix) in strangers.items():
        if start.startswith(magic):
            raise _wrong(path, f'"{path}" is not a safetensors file.', f"Expected safetensors, found {what}.", fix=fix)
    if len(start) < 8:
        raise _damaged(path, f"expected 8 bytes that give the header's length, found {len(start)}: truncated")
    if len(start) > 8 and start[8:9] != b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        raise _damaged(path, f"expected a header that starts with '{{', found {start[8:9]!r}")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(path, f"expected __metadata__ to map text to text, found {_short(value)}")
    return value


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    """One entry, checked. Run up to a million times: texts are made only to be raised."""

    def wrong(reason: str) -> CheckpointError:
        return _damaged(path, f"tensor {_short(name)}: {reason}", tensor=name)

    if not name or _CONTROL.search(name):
        raise wrong("expected a name of printable characters, found an empty one or control characters")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise wrong(f"expected exactly dtype, shape and data_offsets, found {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"expected a dtype of {', '.join(DTYPE_BITS)}, found {_short(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_RANK or max(shape, default=0) > _MAX_DIM:
        raise wrong(f"expected a shape of at most {_MAX_RANK} whole numbers from 0 to 2**40, found {_short(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"expected data_offsets of two rising whole numbers, found {_short(offsets)}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size  # Python's integers do not overflow, and rank and size are bounded above
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise wrong(
            f"expected {bits / 8:g} bytes for {dtype} {_short(shape)}, found {offsets[1] - offsets[0]:,} (data_offsets)"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _check_cover(path: Path, ordered: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Tensors, sorted by offset, must follow each other and end where the file ends."""
    at = 0
    for name, info in ordered.items():
        if info.start != at:
            fault = "overlaps the one before it" if info.start < at else "leaves a hole before it"
            raise _damaged(
                path, f"tensor {_short(name)} {fault}: expected offset {at:,}, found {info.start:,}", tensor=name
            )
        at = info.end
    if at != data_bytes:
        fault = "truncated" if at > data_bytes else "bytes that belong to no tensor"
        raise _damaged(path, f"expected {at:,} bytes of data after the header, found {data_bytes:,}: {fault}")


def _are_counts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - half the time of all() with a generator
        if type(item) is not int or item < 0:
            return False
    return True


def _short(value: Any) -> str:
    # A hostile integer may have more digits than Python prints: never format more than the reader needs.
    try:
        text = ascii(value)
    except ValueError:
        text = f"a {type(value).__name__} with a very long number"
    return text if len(text) <= 120 else text[:117] + "..."


def _damaged(path: Path, reason: str, *, tensor: str | None = None) -> CheckpointError:
    return _wrong(path, f'"{path}" is not a sound safetensors file.', f"{reason}.", fix=_AGAIN, tensor=tensor)


def _wrong(path: Path, what: str, why: str, *, fix: str, tensor: str | None = None) -> CheckpointError:
    return CheckpointError(what, why=why[:1].upper() + why[1:], fix=fix, path=str(path), tensor=tensor)
