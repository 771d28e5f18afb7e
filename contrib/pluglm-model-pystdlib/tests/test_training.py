"""The training script: the split, the optimizer, and a few steps from corpus to checkpoint."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from pluglm_model_pystdlib.corpus import HELD_OUT_MIN_BYTES, is_held_out, prepare
from pluglm_model_pystdlib.export import export
from pluglm_model_pystdlib.muon import Muon, orthogonalise
from pluglm_model_pystdlib.train import fit, learning_rate

import pluglm
from pluglm.registry import Registry


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder like a standard library: many modules, a test, a copy, and a file that does not parse."""
    words, rng = ["alpha", "beta", "gamma", "delta"], random.Random(5)
    root = tmp_path / "library"
    for i in range(60):
        body = "".join(f"def {rng.choice(words)}_{j}(x):\n    return x + {j}\n\n" for j in range(220))
        path = root / ("test" if i % 10 == 0 else "package") / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
    (root / "copy.py").write_text((root / "package" / "module_1.py").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "latin.py").write_bytes(b"x = '\xff'\n")
    return root


def test_the_split_depends_on_the_path_alone_and_never_holds_out_a_test() -> None:
    text = "x" * HELD_OUT_MIN_BYTES
    names = [f"package/module_{i}.py" for i in range(400)]
    chosen = [name for name in names if is_held_out(name, text)]
    assert 5 < len(chosen) < 80
    assert chosen == [name for name in names if is_held_out(name, text + "more")]
    assert not any(is_held_out(f"test/{name}", text) or is_held_out(f"encodings/{name}", text) for name in names)


def test_held_out_files_are_not_in_the_training_text(library: Path, tmp_path: Path) -> None:
    facts = prepare(tmp_path / "corpus", vocab_size=400, root=library)
    held = json.loads((tmp_path / "corpus" / "heldout.json").read_text(encoding="utf-8"))
    assert facts["held_out_files"] == len(held) > 0
    assert facts["train_files"] == 60 - len(held)  # the copy and the unreadable file do not count


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_step() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 40)))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    wide, tall = torch.randn(8, 20), torch.randn(20, 8)
    for matrix in (wide, tall):
        parameter = torch.nn.Parameter(matrix.clone())
        parameter.grad = torch.randn_like(matrix)
        Muon([parameter], lr=0.1, weight_decay=0.0).step()
        assert torch.linalg.matrix_rank(parameter.detach() - matrix) == 8


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(step, step / 100, warmup=10, decay=0.5) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == rates[50] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0.0


@pytest.mark.slow
def test_a_few_steps_lead_from_a_folder_of_source_to_a_checkpoint_that_loads(library: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "corpus", vocab_size=320, root=library)
    shape = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    said = {
        "corpus": tmp_path / "corpus", "out": tmp_path / "run", "shape": json.dumps(shape), "steps": 30, "batch": 4,
        "micro_batch": 2, "length": 32, "lr": 1e-2, "weight_decay": 0.1, "warmup": 3, "decay": 0.4,
        "time_limit_s": float("inf"), "compile": False, "seed": 3, "log_every": 29, "embed_from": None,
        "start_from": None, "teacher": None,
    }  # fmt: skip
    fit(argparse.Namespace(**said))
    log = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["log"]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    folder = export(tmp_path / "run", tmp_path / "corpus", tmp_path / "package")
    lm = pluglm.load(folder, dtype="float32")
    assert isinstance(lm.generate("def alpha", max_new_tokens=4), str)

    # And on to a draft model, with the same tokenizer: its token vectors and its targets are those of the first one.
    prepare(tmp_path / "again", vocab_size=999, root=library, like=folder / "tokenizer.json")
    for name in ("tokenizer.json", "train.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "corpus" / name).read_bytes()
    small = json.dumps({**shape, "hidden_size": 16, "head_dim": 8, "intermediate_size": 24, "num_hidden_layers": 1})
    fit(argparse.Namespace(**{**said, "shape": small, "out": tmp_path / "1", "embed_from": folder}))
    first = export(tmp_path / "1", tmp_path / "corpus", tmp_path / "draft", draft=True)
    fit(argparse.Namespace(
        **{**said, "shape": small, "out": tmp_path / "2", "start_from": first, "teacher": folder, "lr": 1e-3}
    ))  # fmt: skip
    log = json.loads((tmp_path / "2" / "run.json").read_text(encoding="utf-8"))["log"]
    assert log[-1]["loss"] < 6
    second = export(tmp_path / "2", tmp_path / "corpus", tmp_path / "package", draft=True)
    record = json.loads((second / "training.json").read_text(encoding="utf-8"))
    assert (record["start_from"], record["teacher"], record["embed_from"]) == ("draft", "checkpoint", None)
    said = {"decoding": "assisted", "assistant_model": pluglm.load(second, dtype="float32"), "max_new_tokens": 4}
    if "assisted" in {provider.name for provider in Registry.installed().of("decoding")}:
        assert lm.generate("def alpha", **said) == lm.generate("def alpha", max_new_tokens=4)
