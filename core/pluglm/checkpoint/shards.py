"""Which files of a folder hold the weights, and proof that index and files agree.

Names in an index are data of strangers: each must be a plain name of a file in the folder. A symbolic link may lead
only to where the Hub client's cache keeps its files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pluglm.checkpoint.header import Header, read_header, refuse_pickle
from pluglm.checkpoint.strict_json import read_object
from pluglm.errors import CheckpointError, ConfigError, ModelNotFoundError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ODD_NAME = re.compile(r"[/\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def read_shards(folder: Path) -> dict[str, Header]:
    """File name -> Header of every file of weights in a folder, after the full cross-check of index and files.

    Raises: ModelNotFoundError if there are no weights, CheckpointError for everything that is wrong with them.
    """
    index, single = inside(folder, INDEX), inside(folder, SINGLE)
    if index is None:
        if single is None:
            raise _no_weights(folder)
        return {SINGLE: read_header(single)}
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    if single is not None and shards != [SINGLE]:
        raise CheckpointError(
            f'"{folder}" holds two sets of weights.',
            why=f"Expected {SINGLE} or {INDEX}, found both, and the index names other files: one of them is stale.",
            fix=f"Remove {SINGLE} or {INDEX}, whichever is older.",
            path=str(index),
            tensor=None,
        )
    headers = {}
    for shard in shards:
        path = inside(folder, shard)
        if path is None:
            raise _index_wrong(index, f"expected the shard {shard!r} in the folder, found no such file")
        headers[shard] = read_header(path)
    _cross_check(index, weight_map, headers)
    return headers


def inside(folder: Path, name: str) -> Path | None:
    """`folder/name` if it exists, and only if it lies in the folder or in the Hub cache's own store."""
    if not name or name in (".", "..") or _ODD_NAME.search(name) or len(name) > 255:
        raise CheckpointError(
            f"{ascii(name)[:120]} is not the name of a file in the checkpoint.",
            why="Expected a plain file name; found separators, a drive, control characters or a way out.",
            fix="Do not load this checkpoint unless you trust its source; its files should all lie in one folder.",
            path=str(folder),
            tensor=None,
        )
    path = folder / name
    try:
        target = path.resolve()
        if not target.exists():
            return None
    except (OSError, RuntimeError) as e:  # a loop of links
        raise CheckpointError(
            f'"{path}" cannot be resolved.',
            why=str(e),
            fix="Replace the link by the file.",
            path=str(path),
            tensor=None,
        ) from e
    if target.parent == folder or any(store in target.parents for store in _hub_stores(folder)):
        return path
    raise CheckpointError(
        f'"{path}" is a link that leads out of the checkpoint.',
        why=f'Expected a target in "{folder}" (or in the Hub cache\'s store), found "{target}".',
        fix="Copy the file into the folder, or load the folder that it lies in.",
        path=str(path),
        tensor=None,
    )


def _hub_stores(folder: Path) -> tuple[Path, ...]:
    """Where links of a Hub cache snapshot may lead: `models--org--name/blobs`, or the store that all models share."""
    repo = folder.parent.parent
    if folder.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return ()
    return (repo / "blobs", repo.parent / "blobs")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_object(index).get("weight_map")
    except ConfigError as e:
        raise CheckpointError(e.what, why=e.why, fix=e.fix, path=str(index), tensor=None) from e
    if not isinstance(weight_map, dict) or not weight_map:
        raise _index_wrong(index, f"expected weight_map, a non-empty object, found {ascii(weight_map)[:80]}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _index_wrong(index, f"expected a file name, found {ascii(shard)[:80]}", tensor=name)
        inside(index.parent, shard)
        refuse_pickle(index.parent / shard)
        if not shard.endswith(".safetensors"):
            raise _index_wrong(index, f"expected a .safetensors file, found {ascii(shard)[:80]}", tensor=name)
    return weight_map


def _cross_check(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Index and shards must name the same tensors, each in one place."""
    found: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in found:
                both = f"{found[name]} and {shard}"
                raise _index_wrong(index, f"expected it in one shard, found it in {both}", tensor=name)
            found[name] = shard
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise _index_wrong(index, f"expected it in {shard}, found it in {found.get(name, 'no shard')}", tensor=name)
    surplus = [name for name in found if name not in weight_map]
    if surplus:
        raise _index_wrong(
            index, f"expected every tensor of the shards in the index, found {len(surplus)} others", tensor=surplus[0]
        )


def _index_wrong(index: Path, reason: str, *, tensor: str | None = None) -> CheckpointError:
    subject = f"tensor {ascii(tensor)[:120]}: {reason}." if tensor is not None else f"{reason[:1].upper()}{reason[1:]}."
    return CheckpointError(
        f'"{index}" does not fit the files beside it.',
        why=subject[:1].upper() + subject[1:],
        fix="Download the model again; if it is still refused, its author has to save it anew.",
        path=str(index),
        tensor=tensor,
    )


def _no_weights(folder: Path) -> ModelNotFoundError | CheckpointError:
    names = sorted(child.name for child in folder.iterdir())
    for name in names:
        try:
            refuse_pickle(folder / name)
        except CheckpointError as e:
            return e
    hints = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    return ModelNotFoundError(
        f'"{folder}" has no weights.',
        why=f"Expected {SINGLE} or {INDEX}, found {', '.join(hints[:5]) or 'neither'}.",
        fix="Download the model again. An adapter or a GGUF file is loaded through a plugin of its kind.",
        model=str(folder),
        path=str(folder),
    )
