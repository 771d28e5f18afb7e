"""Device and dtype follow from what is there; what is not there is refused, not replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pluglm.errors import ConfigError, InputError
from pluglm.facts import choose_device, choose_dtype


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def checkpoint(*dtypes: str, **config: Any) -> Any:
    tensors: Mapping[str, Any] = {f"t{i}": SimpleNamespace(shape=(i,), dtype=name) for i, name in enumerate(dtypes)}
    return SimpleNamespace(path=Path("model-folder"), config=config, tensors=tensors)


@pytest.mark.parametrize(
    ("wanted", "count", "chosen"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_a_device_that_is_there_is_chosen(
    monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, chosen: str
) -> None:
    gpus(monkeypatch, count)
    device, notes = choose_device(wanted)
    assert device == chosen
    assert notes == (("device: auto chose the first GPU",) if (wanted, count) == ("auto", 2) else ())


@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "", None])
def test_what_is_no_device_is_refused(wanted: Any) -> None:
    with pytest.raises(InputError) as caught:
        choose_device(wanted)
    assert caught.value.what == f"device={wanted!r} is not a device."
    assert caught.value.why
    assert caught.value.fix == 'Write "auto", "cpu", "cuda" or "cuda:1".'
    assert caught.value.argument == "device"
    assert caught.value.__cause__ is not None


def test_a_device_that_no_part_is_tested_on_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        choose_device("mps")
    assert caught.value.what == "device='mps' is of a type that no part here is tested on."
    assert caught.value.fix == 'Write "auto", "cpu" or "cuda".'
    assert caught.value.argument == "device"


@pytest.mark.parametrize(("wanted", "count"), [("cuda", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(InputError) as caught:
        choose_device(wanted)
    assert caught.value.what == f"device={wanted!r} is not there."
    assert caught.value.why == f"torch {torch.__version__} sees {count} CUDA devices."
    assert caught.value.fix == 'Use device="cpu", or install a CUDA build of torch and a driver.'
    assert caught.value.argument == "device"


@pytest.mark.parametrize(
    ("wanted", "found", "device", "chosen"),
    [
        ("auto", checkpoint("F32", dtype="bfloat16"), "cpu", "bfloat16"),
        ("auto", checkpoint("F32", dtype="float64", torch_dtype="bfloat16"), "cpu", "float64"),
        ("auto", checkpoint("F32", torch_dtype="torch.bfloat16"), "cpu", "bfloat16"),
        ("auto", checkpoint("BF16"), "cpu", "bfloat16"),
        ("auto", checkpoint("BF16", dtype="auto"), "cpu", "bfloat16"),
        ("auto", checkpoint("I8", "I64", "BF16"), "cpu", "bfloat16"),
        ("auto", checkpoint("I8"), "cpu", "float32"),
        ("auto", checkpoint(), "cpu", "float32"),
        ("auto", checkpoint("F16"), "cuda:0", "float16"),
        ("float16", checkpoint("F32"), "cpu", "float16"),
        ("torch.float64", checkpoint("F32"), "cpu", "float64"),
        (torch.bfloat16, checkpoint("F32"), "cpu", "bfloat16"),
    ],
)
def test_a_dtype_is_the_users_or_the_configs_or_the_files(wanted: Any, found: Any, device: str, chosen: str) -> None:
    assert choose_dtype(wanted, found, device) == (chosen, ())


def test_auto_avoids_float16_on_a_cpu_and_says_so() -> None:
    dtype, notes = choose_dtype("auto", checkpoint("F16"), "cpu")
    assert dtype == "float32"
    assert notes == ("dtype: auto chose float32, since CPUs multiply float16 on a slow reference path",)


@pytest.mark.parametrize("wanted", ["int8", "fp16", "", None])
def test_what_is_no_dtype_to_run_in_is_refused(wanted: Any) -> None:
    with pytest.raises(InputError) as caught:
        choose_dtype(wanted, checkpoint("F32"), "cpu")
    assert caught.value.what == f"dtype={str(wanted)!r} is not a dtype to run in."
    assert caught.value.fix == 'Write "auto" or one of float32, bfloat16, float16, float64.'
    assert caught.value.argument == "dtype"


@pytest.mark.parametrize("said", ["float8_e4m3fn", "int8", 3])
def test_a_config_that_says_another_dtype_is_refused(said: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_dtype("auto", checkpoint("F32", torch_dtype=said), "cpu")
    assert caught.value.what == f"config.json says dtype {said!r}."
    assert caught.value.why == "a model runs in one of float32, bfloat16, float16, float64."
    assert caught.value.fix == 'Pass dtype="bfloat16" or another of these.'
    assert (caught.value.key, caught.value.path) == ("dtype", "model-folder")
