"""Packed weights are kept for the next load, whole or not at all, and never used for other weights or other settings."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pluglm
from pluglm import InputError
from pluglm.checkpoint.save import _prefix
from pluglm.packed_cache import RECORD, Entry, weights_digest

V, C, F, L, H, K, D = 96, 64, 160, 2, 4, 2, 16
QUANTIZER = "native:int4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of random weights, without a tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    draw = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=draw) / columns**0.5
        return drawn

    weights = {
        "model.embed_tokens.weight": matrix(V, C),
        "lm_head.weight": matrix(V, C),
        "model.norm.weight": torch.ones(C),
    }
    for i in range(L):
        layer = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", H * D, C), ("self_attn.k_proj", K * D, C), ("self_attn.v_proj", K * D, C),
            ("self_attn.o_proj", C, H * D), ("mlp.gate_proj", F, C), ("mlp.up_proj", F, C), ("mlp.down_proj", C, F),
        ):  # fmt: skip
            weights[f"{layer}{name}.weight"] = matrix(rows, columns)
        weights[layer + "input_layernorm.weight"] = weights[layer + "post_attention_layernorm.weight"] = torch.ones(C)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": C,
        "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": D, "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path / "model.safetensors")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries are kept; only in this test."""
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def load(folder: Path, **arguments: Any) -> pluglm.LanguageModel:
    return pluglm.load(folder, **{"quantizer": QUANTIZER, "packed_cache": True, **arguments})


def logits(lm: pluglm.LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(torch.tensor([[3, 41, 7, 5]])).logits
    return found


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob(f"*/{RECORD}"))


def came_from_the_cache(lm: pluglm.LanguageModel) -> bool:
    (note,) = (note for note in lm.plan.notes if note.startswith("packed weights:"))
    return "an earlier load kept" in note


def test_a_second_load_maps_what_the_first_packed(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, plain = load(folder), pluglm.load(folder, quantizer=QUANTIZER)
    (entry,) = entries(cache)

    def packs_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("a layer was packed")

    monkeypatch.setattr("pluglm_quantizer_native.quantizer.rounded", packs_again)
    second = load(folder)
    assert [came_from_the_cache(lm) for lm in (first, second)] == [False, True]
    assert first.plan.hash == second.plan.hash == plain.plan.hash
    assert torch.equal(logits(second), logits(first))
    assert torch.equal(logits(first), logits(plain))
    # Mapped: nothing that this process holds of the packed layers is its own memory.
    file = entry / "model.safetensors"
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(file))]
        module = second.model.module
        for name in ("layers.0.attn.q", "layers.1.mlp.down", "head"):
            for tensor in module.get_submodule(name).buffers():
                at = tensor.data_ptr()
                assert any(int(start, 16) <= at and at + tensor.nbytes <= int(end, 16) for start, end in spans)


def test_what_is_saved_after_a_second_load_is_what_is_saved_after_the_first(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        load(folder).save(tmp_path / name)
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "second/config.json").read_bytes()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_weights_are_never_taken_for_these_even_in_a_file_of_the_same_size_and_time(
    folder: Path, cache: Path
) -> None:
    before, (old,) = load(folder), entries(cache)
    file = folder / "model.safetensors"
    found = file.stat()
    with file.open("r+b") as opened:  # in place: the same inode, size and, below, time of modification
        opened.seek(-8, os.SEEK_END)
        opened.write(b"\0\0\0\x40\0\0\0\x40")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    after = load(folder)
    assert not came_from_the_cache(after)
    assert after.plan.fingerprint == before.plan.fingerprint  # which does not look at weights
    (new,) = entries(cache)
    assert new != old  # what was kept of the weights that are gone is gone, too


def test_a_copy_of_the_same_weights_finds_what_was_packed(folder: Path, cache: Path, tmp_path: Path) -> None:
    load(folder)
    folder.rename(tmp_path / "moved")
    assert came_from_the_cache(load(tmp_path / "moved"))


@pytest.mark.parametrize(
    "other",
    [
        {"quantizer": "native:int8"}, {"dtype": "bfloat16"}, {"quantizer_skip": ("*.down",)},
        {"options": {"quantizer": {"rounding": "nearest"}}},
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_have_an_entry_of_their_own(other: dict[str, Any], folder: Path, cache: Path) -> None:
    load(folder)
    assert not came_from_the_cache(load(folder, **other))
    assert len(entries(cache)) == 2
    again = load(folder, **other)
    assert came_from_the_cache(again)
    assert torch.equal(logits(again), logits(pluglm.load(folder, **{"quantizer": QUANTIZER, **other})))


def truncate(entry: Path) -> None:
    file = entry / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def write_over(entry: Path) -> None:
    with (entry / "model.safetensors").open("r+b") as opened:
        opened.seek(-5, os.SEEK_END)
        opened.write(b"\xff")


def lose_the_weights(entry: Path) -> None:
    (entry / "model.safetensors").unlink()


def break_the_record(entry: Path) -> None:
    (entry / RECORD).write_text('{"files": 3}')


def change_the_config(entry: Path) -> None:
    """With a record that fits: what the files say is checked, too."""
    config = json.loads((entry / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (entry / "config.json").write_text(json.dumps(config))
    record = json.loads((entry / RECORD).read_text())
    found = (entry / "config.json").stat()
    record["files"]["config.json"][:2] = found.st_size, found.st_mtime_ns
    (entry / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate, "not as it was written"), (write_over, "not as it was written"),
        (lose_the_weights, "FileNotFoundError"), (break_the_record, "AttributeError"),
        (change_the_config, "version 99"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_made_anew_with_a_warning(
    damage: Callable[[Path], None], word: str, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, (entry,) = load(folder), entries(cache)
    damage(entry)
    with caplog.at_level(logging.WARNING, "pluglm"):
        second = load(folder)
    assert not came_from_the_cache(second)
    assert torch.equal(logits(second), logits(first))
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "pluglm")
    assert "will be packed anew" in warning
    assert word in warning
    assert came_from_the_cache(load(folder))
    assert entries(cache) == [entry]


def test_an_entry_that_was_copied_whole_is_used(folder: Path, cache: Path) -> None:
    load(folder)
    (entry,) = entries(cache)
    file = entry / "model.safetensors"
    was = file.stat().st_mtime_ns
    os.utime(file, ns=(0, 10**18))
    assert came_from_the_cache(load(folder))
    assert file.stat().st_mtime_ns == was  # so that it is not read whole each time


def test_of_two_processes_that_pack_at_once_the_slower_leaves_what_it_finds(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    (entry,) = entries(cache)
    left = entry.with_name(f"{_prefix(entry)}999999999-ab")  # of one that was killed while it wrote
    left.mkdir()
    before = (entry / "model.safetensors").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "open", lambda self: None)  # nothing was there when it began
        assert not came_from_the_cache(load(folder))
    assert (entry / "model.safetensors").stat().st_ino == before
    (entry / RECORD).unlink()
    assert not came_from_the_cache(load(folder))
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_a_place_that_cannot_be_written_costs_nothing_but_a_warning(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    with caplog.at_level(logging.WARNING, "pluglm"):
        lm = load(folder)
    assert "are not kept" in caplog.text
    assert any(note.startswith("packed weights: could not be kept in ") for note in lm.plan.notes)
    assert torch.equal(logits(lm), logits(pluglm.load(folder, quantizer=QUANTIZER)))


def test_weights_are_hashed_once_while_their_files_stay_as_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pluglm import packed_cache
    from pluglm.checkpoint import open_folder

    read: list[str] = []
    hashed = packed_cache._hashed

    def counted(file: Path) -> str:
        read.append(file.name)
        return hashed(file)

    monkeypatch.setattr(packed_cache, "_hashed", counted)
    young = weights_digest(open_folder(folder), tmp_path / "digests")
    assert weights_digest(open_folder(folder), tmp_path / "digests") == young
    assert read == ["model.safetensors"] * 2  # a file written a moment ago may be written again in the same tick
    monkeypatch.setattr(packed_cache, "_FRESH_NS", 0)
    for _ in range(3):
        assert weights_digest(open_folder(folder), tmp_path / "digests") == young
    assert read == ["model.safetensors"] * 3
    file = folder / "model.safetensors"
    found = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\x40")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))  # which cannot set the time of change
    assert weights_digest(open_folder(folder), tmp_path / "digests") != young


def test_what_has_nothing_to_keep_is_refused(folder: Path, cache: Path, tmp_path: Path) -> None:
    pluglm.load(folder, quantizer=QUANTIZER).save(tmp_path / "packed")
    for model, why in ((folder, "no quantizer is named."), (tmp_path / "packed", "the checkpoint is packed already, ")):
        with pytest.raises(InputError, match="has nothing to keep") as caught:
            load(model, quantizer=None)
        assert caught.value.why.startswith(why)
        assert caught.value.fix.lower().endswith("leave packed_cache out.")
    with pytest.raises(InputError, match="packed_cache is 'yes'"):
        load(folder, packed_cache="yes")


def test_a_new_process_reads_a_packed_model_without_the_compiler(folder: Path, cache: Path) -> None:
    """Importing it takes longer than all that has to be done."""
    load(folder)
    code = (
        "import sys, pluglm\n"
        f"lm = pluglm.load({str(folder)!r}, quantizer={QUANTIZER!r}, packed_cache=True)\n"
        "lm.complete([3, 41, 7], max_new_tokens=2)\n"
        "assert any('an earlier load kept' in note for note in lm.plan.notes)\n"
        "print(*[name for name in ('torch._dynamo', 'torch.distributed.fsdp', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
