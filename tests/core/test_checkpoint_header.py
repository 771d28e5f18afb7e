"""The header reader against sound files, against the reference reader, and against mutants of a header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pluglm.checkpoint import TensorInfo, open_folder, read_header
from pluglm.errors import CheckpointError


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_of_the_reference_writer_is_read_in_full(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0, 4)},
        path,
        metadata={"k": "v"},
    )
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (5,)),
        "c": ("F32", (0, 4)),
    }
    assert header.metadata == {"k": "v"}
    assert header.file_bytes == path.stat().st_size == header.data_offset + 24 + 10


def test_tensors_may_stand_in_any_order_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    late, early = (
        {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
    )
    path.write_bytes(raw_file({"late": late, "early": early}, b"abc"))
    assert list(read_header(path).tensors) == ["early", "late"]
    assert read_header(path).tensors["early"] == TensorInfo("U8", (), 0, 1)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x0580])
def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(length: int, tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file(text.ljust(length), b"x"))
    assert path.read_bytes()[:1] == b"\x80"
    assert list(read_header(path).tensors) == ["a"]


def test_an_error_carries_the_path_and_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file({"layers.0.w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8))
    with pytest.raises(CheckpointError, match=r"layers\.0\.w.*expected 12 bytes.*found 8") as caught:
        read_header(path)
    assert caught.value.path == str(path)
    assert caught.value.tensor == "layers.0.w"


NAMES = st.sampled_from(["a", "b", "c", "", "a\0", "../x", "\ud800", "__metadata__", "é"])
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, -1, 2**31, 2**32, 2**40, 2**63, 2**64, 1.0, True, None, "4"]
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=4),
    st.sampled_from(["F32", "F16", "BF16", "I8", "U8", "BOOL", "F64", "F4", "F31", "", {}, {"a": "b"}, {"a": 1}]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), NAMES, st.sampled_from(["dtype", "shape", "data_offsets", "extra"]), VALUES),
        st.tuples(st.just("entry"), NAMES, st.just(""), VALUES),
        st.tuples(st.just("copy"), NAMES, NAMES, st.none()),
        st.tuples(st.just("drop"), NAMES, st.sampled_from(["dtype", "shape", "data_offsets", ""]), st.none()),
        st.tuples(st.just("data"), st.just(""), st.just(""), st.integers(-40, 16)),
        st.tuples(st.just("length"), st.just(""), st.just(""), st.sampled_from([-8, -1, 1, 8, 2**27, 2**62])),
        st.tuples(st.just("byte"), st.just(""), st.just(""), st.tuples(st.integers(0, 250), st.integers(0, 255))),
    ),
    max_size=3,
)


def _mutant(steps: list[tuple[str, str, str, Any]]) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I8", "shape": [0, 7], "data_offsets": [32, 32]},
    }
    data, longer = bytes(range(32)), 0
    flips = []
    for kind, name, second, value in steps:
        if kind == "set" and isinstance(header.get(name), dict):
            header[name][second] = value
        elif kind == "entry":
            header[name] = value
        elif kind == "copy" and name in header:
            header[second] = header[name]
        elif kind == "drop":
            if second and isinstance(header.get(name), dict):
                header[name].pop(second, None)
            else:
                header.pop(name, None)
        elif kind == "data":
            data = data[:value] if value < 0 else data + b"\0" * value
        elif kind == "length":
            longer = value
        elif kind == "byte":
            flips.append(value)
    text = json.dumps(header).encode()
    raw = bytearray(max(0, len(text) + longer).to_bytes(8, "little") + text + data)
    for at, byte in flips:
        raw[at % len(raw)] = byte
    return bytes(raw)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_a_mutant_of_a_header_is_refused_or_loads_bit_identically(
    steps: list[tuple[str, str, str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.unlink(missing_ok=True)  # a new inode: an old mapping must not see the new bytes
    path.write_bytes(_mutant(steps))
    try:
        checkpoint = open_folder(tmp_path)
    except CheckpointError as e:
        if e.path != str(path) or not e.why or not e.fix:
            raise
        return
    with safe_open(path, framework="pt") as reference:  # what we accept, the reference accepts
        assert sorted(reference.keys()) == sorted(checkpoint.tensors)
        for name in checkpoint.tensors:
            try:
                expected = reference.get_tensor(name)
            except (SafetensorError, AttributeError, TypeError):
                continue  # a dtype that the reference's torch side does not know
            found = checkpoint.tensor(name)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert (
                found.contiguous().view(-1).view(torch.uint8).tolist()
                == expected.contiguous().view(-1).view(torch.uint8).tolist()
            )
