"""Opening a folder: tensors are views of the files, writes stay in memory, changed files are noticed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pluglm.checkpoint import open_folder
from pluglm.contracts import Checkpoint as CheckpointProtocol
from pluglm.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.complex64,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(5)}, model / "model.safetensors")
    return model


def _bits(tensor: torch.Tensor) -> list[int]:
    return list(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def test_a_checkpoint_keeps_the_contract_that_plugins_are_held_to(folder: Path) -> None:
    checkpoint = open_folder(folder)
    assert isinstance(checkpoint, CheckpointProtocol)
    assert checkpoint.path == folder.resolve()
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config is None
    assert checkpoint.weights_bytes == 44
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"w": (2, 3), "b": (5,)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, folder: Path) -> None:
    values = torch.randint(0, 2, (3, 5)).to(dtype)
    save_file({"x": values, "empty": values[:0]}, folder / "model.safetensors")
    checkpoint = open_folder(folder)
    assert checkpoint.tensor("x").dtype == dtype
    assert checkpoint.tensor("x").shape == (3, 5)
    assert _bits(checkpoint.tensor("x")) == _bits(values)
    assert checkpoint.tensor("empty").shape == (0, 5)


def test_two_reads_of_a_tensor_share_the_mapped_memory(folder: Path) -> None:
    checkpoint = open_folder(folder)
    assert checkpoint.tensor("w").data_ptr() == checkpoint.tensor("w").data_ptr()


def test_writing_to_a_tensor_changes_memory_and_never_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = open_folder(folder)
    parameter = torch.nn.Parameter(checkpoint.tensor("w"))
    with torch.no_grad():
        parameter.fill_(9.0)
    assert checkpoint.tensor("w").tolist() == [[9.0] * 3] * 2
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_tensor_outlives_its_checkpoint(folder: Path) -> None:
    assert open_folder(folder).tensor("w").sum().item() == 15.0


def test_a_tensor_that_is_not_aligned_is_copied_and_equal(folder: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    data = struct.pack("<2f", 1.5, -2.0)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\7" + data)
    assert open_folder(folder).tensor("odd").tolist() == [1.5, -2.0]


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'x'") as caught:
        open_folder(folder).tensor("x")
    assert caught.value.tensor == "x"


def test_a_dtype_that_torch_lacks_is_refused_when_it_is_read(folder: Path) -> None:
    text = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    checkpoint = open_folder(folder)
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        checkpoint.tensor("x")


@pytest.mark.parametrize("size", [0, 8, 40, 200])
def test_a_file_truncated_after_opening_is_an_error_and_no_crash(size: int, folder: Path) -> None:
    checkpoint = open_folder(folder)
    os.truncate(folder / "model.safetensors", min(size, (folder / "model.safetensors").stat().st_size - 1))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.tensor("w")


def test_a_file_truncated_after_the_first_tensor_is_an_error_and_no_crash(folder: Path) -> None:
    checkpoint = open_folder(folder)
    checkpoint.tensor("b")
    os.truncate(folder / "model.safetensors", 20)
    with pytest.raises(CheckpointError, match="found another version of 20 bytes"):
        checkpoint.tensor("w")


def test_a_file_replaced_after_opening_is_noticed(folder: Path) -> None:
    checkpoint = open_folder(folder)
    save_file({"w": torch.zeros(2, 3), "b": torch.ones(5)}, folder / "new")
    (folder / "new").rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.tensor("w")


def test_a_file_removed_after_opening_is_named(folder: Path) -> None:
    checkpoint = open_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        checkpoint.tensor("w")


def test_a_file_removed_while_mapped_stays_readable(folder: Path) -> None:
    checkpoint = open_folder(folder)
    tensor = checkpoint.tensor("w")
    (folder / "model.safetensors").unlink()
    assert tensor.sum().item() == 15.0
    assert checkpoint.tensor("b").sum().item() == 5.0


def test_the_fingerprint_follows_config_and_headers_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = open_folder(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_folder(tmp_path / "copy").fingerprint == first
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    assert open_folder(folder).fingerprint != first
    save_file({"w": torch.zeros(2, 4)}, tmp_path / "copy" / "model.safetensors")
    assert open_folder(tmp_path / "copy").fingerprint != first


def test_many_threads_may_read_one_checkpoint(folder: Path) -> None:
    checkpoint = open_folder(folder)
    sums: list[float] = []
    threads = [threading.Thread(target=lambda: sums.append(checkpoint.tensor("w").sum().item())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [15.0] * 8
    assert len({checkpoint.tensor("w").data_ptr()}) == 1


def test_a_file_beside_the_weights_is_found_or_none(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = open_folder(folder)
    assert checkpoint.file("tokenizer.json") == folder.resolve() / "tokenizer.json"
    assert checkpoint.file("merges.txt") is None
    with pytest.raises(CheckpointError, match="not the name of a file"):
        checkpoint.file("../secret")


def test_a_folder_reached_through_a_link_opens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert open_folder(tmp_path / "alias").path == folder.resolve()


def _as_hub_cache(folder: Path, root: Path, target: Path) -> Path:
    """The same model as a snapshot whose weights are a link to `target`, relative as the Hub client writes it."""
    snapshot = root / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "config.json", snapshot / "config.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "model.safetensors", target)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(target, snapshot))
    return snapshot


@pytest.mark.parametrize("store", ["models--org--name/blobs/sha", "blobs/ab/sha"])
def test_links_into_the_stores_of_the_hub_cache_are_followed(store: str, folder: Path, tmp_path: Path) -> None:
    snapshot = _as_hub_cache(folder, tmp_path / "hub", tmp_path / "hub" / store)
    assert open_folder(snapshot).tensor("w").sum().item() == 15.0


@pytest.mark.parametrize("place", ["models--other--name/blobs/sha", "models--org--name/refs/main", "../blobs/sha"])
def test_links_of_a_hub_cache_to_anywhere_else_are_refused(place: str, folder: Path, tmp_path: Path) -> None:
    snapshot = _as_hub_cache(folder, tmp_path / "hub", tmp_path / "hub" / place)
    with pytest.raises(CheckpointError, match="leads out"):
        open_folder(snapshot)


def test_opening_imports_no_torch_and_no_hub_client() -> None:
    code = "import pluglm.checkpoint, sys; print([m for m in ('torch', 'huggingface_hub', 'rich', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_sorted_and_complete() -> None:
    import pluglm.checkpoint as package

    assert list(package.__all__) == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
