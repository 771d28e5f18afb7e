"""A checkpoint in a local folder: config, tensors that are views of the files, and the files beside them.

Nothing in the folder is trusted: names in the index may not leave it, every header is checked before the first tensor
is read, and index and shards must agree in both directions. A local folder is treated as a downloaded one is.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluglm.checkpoint.header import Header, TensorInfo, file_identity
from pluglm.checkpoint.shards import inside, read_shards
from pluglm.checkpoint.strict_json import read_object
from pluglm.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    import torch

# dtype in the file → name of the dtype in torch.
_TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def open_folder(path: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder; every file is checked, no weight is read.

    Raises: ModelNotFoundError if there is no such folder or no weights in it, ConfigError for its JSON files,
    CheckpointError for its weights.
    """
    return Checkpoint(path)


class Checkpoint:
    """The checkpoint in one folder. Follows `pluglm.contracts.Checkpoint`; safe to share between threads.

    Attributes:
        path: the folder, absolute, symbolic links resolved.
        config: `config.json`.
        generation_config: `generation_config.json`, or None.
        tensors: name → TensorInfo over all shards.
        shards: names of the files that hold the weights.
        weights_bytes: sum of the tensors' bytes.
        fingerprint: sha256 over config.json, headers and file sizes. Weights are not read, so it tells checkpoints
            apart; it does not prove that no bit of a weight has changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _existing_folder(Path(path))
        config = self.file("config.json")
        if config is None:
            raise ModelNotFoundError(
                f'"{self.path}" has no config.json.',
                why="It says which architecture the weights belong to; without it nothing can be built.",
                fix="Check that this is the folder of a model, or download it again.",
                model=str(path),
                path=str(self.path / "config.json"),
            )
        self.config: dict[str, Any] = read_object(config, infinity=True)
        generation = self.file("generation_config.json")
        self.generation_config: dict[str, Any] | None = read_object(generation) if generation is not None else None
        self._headers = read_shards(self.path)
        self.shards = tuple(self._headers)
        self._shard_of = {name: shard for shard, header in self._headers.items() for name in header.tensors}
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for header in self._headers.values() for name, info in header.tensors.items()
        }
        self.weights_bytes = sum(info.end - info.start for info in self.tensors.values())
        self.fingerprint = _fingerprint(config, self._headers)
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors, {self.weights_bytes:,} bytes)"

    def file(self, name: str) -> Path | None:
        """The path of a file in the folder, or None if it has none of that name.

        Raises: CheckpointError if `name` is not a plain file name or its symbolic link leads out of the folder.
        """
        return inside(self.path, name)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as a view of the mapped file: no copy, pages are read when they are used.

        The mapping is private: writing to the tensor changes memory, never the file. A tensor whose bytes are not
        aligned to its dtype is copied. Truncating a file that is mapped ends the process on most systems; replace
        files by renaming, as `atomic_folder` does.

        Raises: CheckpointError with `.tensor` if there is no such tensor, torch has no such dtype, or the file is no
        longer the one whose header was checked.
        """
        import torch

        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f'"{self.path}" has no tensor {name!r}.',
                why=f"It holds {len(self.tensors)} tensors, none of that name.",
                fix="Check the weight map of the architecture against `checkpoint.tensors`.",
                path=str(self.path),
                tensor=name,
            )
        shard = self._shard_of[name]
        dtype = getattr(torch, _TORCH_NAMES.get(info.dtype, ""), None)
        if dtype is None:
            raise CheckpointError(
                f"Tensor {name!r} has dtype {info.dtype}.",
                why=f"Expected one of {', '.join(_TORCH_NAMES)}; torch {torch.__version__} has no type for it.",
                fix="Load the checkpoint with the quantizer that it was made for, or install a newer torch.",
                path=str(self.path / shard),
                tensor=name,
            )
        if info.start == info.end:
            return torch.empty(info.shape, dtype=dtype)
        mapped = self._map(shard, name)
        start = self._headers[shard].data_offset + info.start
        if start % dtype.itemsize:
            copy = bytearray(mapped[start : start + info.end - info.start])
            return torch.frombuffer(copy, dtype=dtype).view(info.shape)
        count = (info.end - info.start) // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start).view(info.shape)

    def _map(self, shard: str, tensor: str) -> mmap.mmap:
        header = self._headers[shard]
        with self._lock:
            mapped = self._maps.get(shard)
            try:
                if mapped is None:
                    with (self.path / shard).open("rb") as file:
                        if file_identity(os.fstat(file.fileno())) != header.identity:
                            raise self._changed(shard, tensor, os.fstat(file.fileno()).st_size)
                        mapped = mmap.mmap(file.fileno(), header.file_bytes, access=mmap.ACCESS_COPY)
                    self._maps[shard] = mapped
                if mapped.size() < header.file_bytes:  # asks the file, so a later truncation shows before it is touched
                    raise self._changed(shard, tensor, mapped.size())
            except (OSError, ValueError) as e:
                raise CheckpointError(
                    f'"{self.path / shard}" cannot be mapped.',
                    why=str(e),
                    fix="Check that the file still exists and is readable, and that memory may be mapped (ulimit -v).",
                    path=str(self.path / shard),
                    tensor=tensor,
                ) from e
        return mapped

    def _changed(self, shard: str, tensor: str, size: int) -> CheckpointError:
        return CheckpointError(
            f'"{self.path / shard}" has changed since it was opened.',
            why=f"Expected the file of {self._headers[shard].file_bytes:,} bytes whose header was checked, "
            f"found another version of {size:,} bytes (reading tensor {tensor!r}).",
            fix="Let the writer finish, then load again; check the file's size if it stays short.",
            path=str(self.path / shard),
            tensor=tensor,
        )


def _existing_folder(path: Path) -> Path:
    try:
        found = path.expanduser().resolve()
        is_folder = found.is_dir()
    except (OSError, RuntimeError, ValueError) as e:
        raise _no_folder(path, str(e)) from e
    if not is_folder:
        raise _no_folder(path, "expected a folder, found " + ("a file" if found.exists() else "nothing"))
    return found


def _no_folder(path: Path, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f'There is no model folder "{path}".',
        why=why,
        fix="Give the folder that holds config.json, or `org/name` of a model on the Hub.",
        model=str(path),
        path=str(path),
    )


def _fingerprint(config: Path, headers: Mapping[str, Header]) -> str:
    shards = {name: [header.digest, header.file_bytes] for name, header in sorted(headers.items())}
    return hashlib.sha256(config.read_bytes() + b"\0" + json.dumps(shards).encode()).hexdigest()
