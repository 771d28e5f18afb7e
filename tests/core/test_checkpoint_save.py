"""Saving: the old checkpoint or the new one, complete, and nothing else, whatever fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pluglm.checkpoint import atomic_folder, open_folder, save, write_safetensors
from pluglm.errors import SaveError

TENSORS = [("a", torch.arange(6.0)), ("b", torch.ones(2, 3)), ("c", torch.zeros(4))]


def _save(path: Path, value: float = 1.0, **options: Any) -> None:
    with atomic_folder(path) as folder:
        (folder / "config.json").write_text('{"model_type": "llama"}')
        write_safetensors(folder, [("w", torch.full((3,), value))], **options)


def _value(path: Path) -> float:
    return float(open_folder(path).tensor("w")[0].item())


def test_a_saved_checkpoint_opens(tmp_path: Path) -> None:
    _save(tmp_path / "m")
    assert _value(tmp_path / "m") == 1.0
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert open_folder(tmp_path / "m")._headers["model.safetensors"].metadata == {"format": "pt"}


def test_many_tensors_become_shards_with_an_index_that_agrees(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "m") as folder:
        (folder / "config.json").write_text("{}")
        names = write_safetensors(folder, TENSORS, max_shard_bytes=30)
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    checkpoint = open_folder(tmp_path / "m")
    for name, tensor in TENSORS:
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", *names, "model.safetensors.index.json"]


def test_a_view_that_is_not_contiguous_is_written_by_value(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "m") as folder:
        (folder / "config.json").write_text("{}")
        write_safetensors(folder, [("t", torch.arange(6.0).view(2, 3).T)])
    assert open_folder(tmp_path / "m").tensor("t").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_shards_are_written_as_they_fill(tmp_path: Path) -> None:
    present: list[int] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            present.append(len(list(tmp_path.iterdir())))
            yield f"t{number}", torch.ones(10)

    write_safetensors(tmp_path, tensors(), max_shard_bytes=40)
    assert present == [0, 0, 1, 2]


def test_saving_over_a_checkpoint_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path / "m", 1.0)
    _save(tmp_path / "m", 2.0)
    assert _value(tmp_path / "m") == 2.0
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_saving_over_a_checkpoint_works_without_an_exchange_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "_exchange", lambda one, other: False)
    _save(tmp_path / "m", 1.0)
    _save(tmp_path / "m", 2.0)
    assert _value(tmp_path / "m") == 2.0
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_saving_over_the_files_that_are_mapped_is_bit_identical(tmp_path: Path) -> None:
    _save(tmp_path / "m", 3.0)
    checkpoint = open_folder(tmp_path / "m")
    mapped = checkpoint.tensor("w")
    with atomic_folder(tmp_path / "m") as folder:
        (folder / "config.json").write_text("{}")
        write_safetensors(folder, ((name, checkpoint.tensor(name)) for name in checkpoint.tensors))
    assert mapped.tolist() == [3.0] * 3
    assert _value(tmp_path / "m") == 3.0


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _save(tmp_path / "empty")
    _save(tmp_path / "x" / "y" / "m")
    assert _value(tmp_path / "empty") == _value(tmp_path / "x" / "y" / "m") == 1.0


@pytest.mark.parametrize("stranger", ["README.md", "optimizer.pt", "notes.txt", ".git/config", "model/x"])
def test_a_folder_with_anything_of_the_users_is_not_replaced(stranger: str, tmp_path: Path) -> None:
    _save(tmp_path / "m")
    (tmp_path / "m" / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / "m" / stranger).write_text("mine")
    with pytest.raises(SaveError, match=stranger.split("/")[0].replace(".", r"\.")) as caught:
        _save(tmp_path / "m", 2.0)
    assert caught.value.path == str(tmp_path / "m")
    assert (tmp_path / "m" / stranger).read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_what_the_user_adds_while_we_write_is_not_replaced(tmp_path: Path) -> None:
    _save(tmp_path / "m")
    with pytest.raises(SaveError, match="late"), atomic_folder(tmp_path / "m"):
        (tmp_path / "m" / "late.md").write_text("mine")
    assert _value(tmp_path / "m") == 1.0


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(SaveError, match="it is a file"):
        _save(tmp_path / "m")


@pytest.mark.parametrize(
    ("failure", "raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), SaveError, "Free some space"),
        (OSError(errno.EROFS, "Read-only file system"), SaveError, "you may write to"),
        (OSError(errno.EIO, "Input/output error"), SaveError, "Input/output"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (ValueError("mine"), ValueError, "mine"),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_in_the_middle_leaves_what_was_there(
    failure: BaseException, raised: type[BaseException], words: str, existing: bool, tmp_path: Path
) -> None:
    target = tmp_path / "m" if existing else tmp_path / "new" / "m"
    if existing:
        _save(target)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(8)
        yield "x", torch.ones(8)
        raise failure

    with pytest.raises(raised, match=words) as caught, atomic_folder(target) as folder:
        write_safetensors(folder, tensors(), max_shard_bytes=32)
    assert os.listdir(tmp_path) == (["m"] if existing else [])
    if existing:
        assert _value(target) == 1.0
    if isinstance(caught.value, SaveError):
        assert caught.value.path == str(target)
        assert "intact" in caught.value.what
        assert caught.value.__cause__ is failure


@pytest.mark.parametrize("step", ["_sync", "_put_in_place", "_exchange"])
def test_a_failure_at_the_end_leaves_what_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "m")

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, step, fail)
    with pytest.raises(SaveError, match="No space left"):
        _save(tmp_path / "m", 2.0)
    assert _value(tmp_path / "m") == 1.0
    assert os.listdir(tmp_path) == ["m"]


def test_without_an_exchange_a_failed_rename_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "m")
    rename = Path.rename

    def fail_into_place(self: Path, target: Any) -> Path:
        if Path(target) == tmp_path / "m" and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(save, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(SaveError):
        _save(tmp_path / "m", 2.0)
    assert _value(tmp_path / "m") == 1.0
    assert os.listdir(tmp_path) == ["m"]


def test_a_disk_that_is_full_inside_the_writer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SaveError, match="Free some space") as caught:
        _save(tmp_path / "m")
    assert caught.value.path == str(tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_two_tensors_of_one_name_and_shared_memory_are_refused(tmp_path: Path) -> None:
    one = torch.ones(4)
    with pytest.raises(SaveError, match="called 'a'"):
        write_safetensors(tmp_path, [("a", one), ("a", one)])
    with pytest.raises(SaveError, match=r"share[\s\S]*Leave out tied"):
        write_safetensors(tmp_path, [("a", one), ("b", one)])


def test_a_killed_save_leaves_the_old_checkpoint_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    _save(tmp_path / "m")
    code = (
        "import os, signal, sys; from pathlib import Path; from pluglm.checkpoint.save import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'config.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    assert _value(tmp_path / "m") == 1.0
    _save(tmp_path / "m", 2.0)
    assert os.listdir(tmp_path) == ["m"]
    assert _value(tmp_path / "m") == 2.0
