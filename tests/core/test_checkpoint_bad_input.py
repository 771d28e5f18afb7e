"""A table of damaged, hostile and mistaken model folders: each is refused with a typed error, quickly, and left as it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pluglm.checkpoint import open_folder, read_header
from pluglm.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError

Mutate = Callable[[Path], object]


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SHARDS = {"a.safetensors": {"one": entry()}, "b.safetensors": {"two": entry()}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model of two shards, inside a folder that holds bait."""
    (tmp_path / "bait.safetensors").write_bytes(raw_file({"one": entry()}, b"\0" * 8))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    for name, header in SHARDS.items():
        (model / name).write_bytes(raw_file(header, b"\0" * 8))
    write_index(model, {"one": "a.safetensors", "two": "b.safetensors"})
    return model


def write_index(model: Path, weight_map: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(content: bytes) -> Mutate:
    return lambda model: (model / "a.safetensors").write_bytes(content)


def header(value: Any, data: bytes = b"\0" * 8) -> Mutate:
    return shard(raw_file(value, data))


def tensor(**fields: Any) -> Mutate:
    return header({"one": entry(**fields)})


def config(text: str | bytes) -> Mutate:
    return lambda model: (model / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)


def index(text: str) -> Mutate:
    return lambda model: (model / "model.safetensors.index.json").write_text(text)


def points_to(name: Any) -> Mutate:
    return lambda model: write_index(model, {"one": name, "two": "b.safetensors"})


def edit_index(**weight_map: str) -> Mutate:
    return lambda model: write_index(model, weight_map)


def drop(*names: str) -> Mutate:
    return lambda model: [(model / name).unlink() for name in names]


def link(name: str, target: str) -> Mutate:
    def mutate(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return mutate


def make_fifo(model: Path) -> None:
    (model / "a.safetensors").unlink()
    os.mkfifo(model / "a.safetensors")


def make_dir(name: str) -> Mutate:
    def mutate(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).mkdir()

    return mutate


def cut(bytes_off: int) -> Mutate:
    return lambda model: os.truncate(model / "a.safetensors", (model / "a.safetensors").stat().st_size - bytes_off)


def only(name: str, content: bytes = b"x") -> Mutate:
    def mutate(model: Path) -> None:
        drop("a.safetensors", "b.safetensors", "model.safetensors.index.json")(model)
        (model / name).write_bytes(content)

    return mutate


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return buffer.getvalue()


ONE, TWO = SHARDS["a.safetensors"]["one"], SHARDS["b.safetensors"]["two"]
BIG = "9" * 5000

OUTSIDE = [
    "../bait.safetensors", "..\\bait.safetensors", "./a.safetensors", "/etc/passwd.safetensors", "C:\\bait.safetensors",
    "C:bait.safetensors", "\\\\host\\share\\bait.safetensors", "sub/../../bait.safetensors", "sub/a.safetensors", "..", ".", "",
    "a.safetensors/", "file:///bait.safetensors", "http://host/bait.safetensors", "a.safetensors\0.json", "\0", "a\n.safetensors",
    "../model/a.safetensors", "....//bait.safetensors", "\u0085.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors",
    "//bait.safetensors", "~/../bait.safetensors",
]  # fmt: skip

ROWS: list[tuple[str, Mutate, type[ModelError], str]] = [
    # the file as a whole
    ("missing shard", drop("a.safetensors"), CheckpointError, "a.safetensors"),
    ("all shards missing", drop("a.safetensors", "b.safetensors"), CheckpointError, "no such file"),
    ("empty shard", shard(b""), CheckpointError, "found 0: truncated"),
    ("five bytes", shard(b"\x05\0\0\0\0"), CheckpointError, "found 5: truncated"),
    ("eight bytes of length only", shard((100).to_bytes(8, "little")), CheckpointError, "truncated"),
    ("cut by one byte", cut(1), CheckpointError, "found 7: truncated"),
    ("cut in the header", cut(20), CheckpointError, "truncated"),
    ("header longer than the file", shard((90_000).to_bytes(8, "little") + b'{"one":'), CheckpointError, "truncated"),
    ("header length 2**64 - 1", shard(b"\xff" * 8 + b"{}"), CheckpointError, "at most 100,000,000"),
    ("header length just above the limit", shard((100_000_001).to_bytes(8, "little") + b"{}"), CheckpointError, "found 100,000,001"),
    ("bytes after the last tensor", header({"one": ONE}, b"\0" * 9), CheckpointError, "belong to no tensor"),
    ("zeros only", shard(b"\0" * 64), CheckpointError, "starts with"),
    ("a folder", make_dir("a.safetensors"), CheckpointError, "found a folder"),
    ("a named pipe", make_fifo, CheckpointError, "a device"),
    ("a git-lfs pointer", shard(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), CheckpointError, "git lfs pull"),
    ("an HTML page", shard(b"<!DOCTYPE html><html>Not found</html>"), CheckpointError, "web page"),
    ("a GGUF file", shard(b"GGUF\x03\0\0\0" + b"\0" * 32), CheckpointError, "GGUF"),
    # pickles, whatever they are called
    ("pickle protocol 2 renamed", shard(pickle.dumps({"a": 1}, 2)), CheckpointError, "pickle"),
    ("pickle protocol 4 renamed", shard(pickle.dumps({"a": list(range(99))}, 4)), CheckpointError, "run any code"),
    ("pickle protocol 5 renamed", shard(pickle.dumps("x" * 99, 5)), CheckpointError, "pickle"),
    ("torch zip renamed", shard(zip_bytes()), CheckpointError, "pickle"),
    ("only pytorch_model.bin", only("pytorch_model.bin"), CheckpointError, "pickled"),
    ("only model.pt", only("model.pt"), CheckpointError, "pickled"),
    ("only model.PTH", only("model.PTH"), CheckpointError, "pickled"),
    ("only last.ckpt", only("last.ckpt"), CheckpointError, "convert it in a sandbox"),
    ("index names a pickle", points_to("pytorch_model.bin"), CheckpointError, "pickled"),
    # the header's text
    ("header is no JSON", header(b'{"one": '), CheckpointError, "JSON"),
    ("header is a list", header(b"[]"), CheckpointError, "starts with"),
    ("header starts with a space", header(b" " + json.dumps({"one": ONE}).encode()), CheckpointError, "starts with"),
    ("header is not UTF-8", header(b'{"\xff": 1}'), CheckpointError, "UTF-8"),
    ("a tensor twice", header(f'{{"one": {json.dumps(ONE)}, "one": {json.dumps(ONE)}}}'.encode()), CheckpointError, "stands twice"),
    ("a dtype twice", header(b'{"one": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), CheckpointError, "stands twice"),
    ("brackets without end", header(b'{"a":' + b"[" * 200_000), CheckpointError, "nested"),
    ("NaN in the header", header(b'{"one": NaN}'), CheckpointError, "NaN"),
    ("1e400 in the header", header(b'{"one": 1e400}'), CheckpointError, "double"),
    ("an integer of 5000 digits", header(f'{{"one": {{"dtype": "F32", "shape": [{BIG}], "data_offsets": [0, 8]}}}}'.encode()), CheckpointError, "digits"),
    ("metadata is a list", header({"__metadata__": [], "one": ONE}), CheckpointError, "__metadata__"),
    ("metadata holds a number", header({"__metadata__": {"a": 1}, "one": ONE}), CheckpointError, "text to text"),
    # a tensor's entry
    ("entry is null", header({"one": None}), CheckpointError, "exactly dtype, shape"),
    ("entry lacks its dtype", header({"one": {"shape": [2], "data_offsets": [0, 8]}}), CheckpointError, "exactly dtype"),
    ("entry has a fourth field", header({"one": {**ONE, "code": "os"}}), CheckpointError, "exactly dtype"),
    ("empty name", header({"": ONE}), CheckpointError, "printable"),
    ("NUL in a name", header({"a\0b": ONE}), CheckpointError, "control"),
    ("newline in a name", header({"a\nb": ONE}), CheckpointError, "control"),
    ("half a surrogate in a name", header({"\ud800": ONE}), CheckpointError, "control"),
    ("unknown dtype", tensor(dtype="F31"), CheckpointError, "expected a dtype"),
    ("dtype in small letters", tensor(dtype="f32"), CheckpointError, "found 'f32'"),
    ("dtype is a list", tensor(dtype=["F32"]), CheckpointError, "expected a dtype"),
    ("dtype does not fit the bytes", tensor(dtype="F64"), CheckpointError, "expected 16 bytes"),
    ("shape does not fit the bytes", tensor(shape=[3]), CheckpointError, "expected 12 bytes"),
    ("shape is a number", tensor(shape=2), CheckpointError, "expected a shape"),
    ("negative dimension", tensor(shape=[-2]), CheckpointError, "expected a shape"),
    ("two negative dimensions", tensor(shape=[-2, -1]), CheckpointError, "expected a shape"),
    ("dimension is a fraction", tensor(shape=[2.0]), CheckpointError, "expected a shape"),
    ("dimension is true", tensor(shape=[True, 2]), CheckpointError, "expected a shape"),
    ("dimension is text", tensor(shape=["2"]), CheckpointError, "expected a shape"),
    ("product overflows 64 bits to 8 bytes", tensor(shape=[2**33, 2**31, 2]), CheckpointError, "data_offsets"),
    ("huge dimension of an empty tensor", tensor(shape=[2**60, 0], offsets=[0, 0]), CheckpointError, "2**40"),
    ("a thousand dimensions", tensor(shape=[1] * 1000), CheckpointError, "at most 64"),
    ("sub-byte elements that fill no byte", tensor(dtype="F4", shape=[3], offsets=[0, 1]), CheckpointError, "1.5 bytes"),
    ("offsets fall", tensor(offsets=[8, 0]), CheckpointError, "rising"),
    ("offsets are negative", tensor(offsets=[-8, 0]), CheckpointError, "rising"),
    ("one offset", tensor(offsets=[8]), CheckpointError, "rising"),
    ("three offsets", tensor(offsets=[0, 8, 8]), CheckpointError, "rising"),
    ("offsets are fractions", tensor(offsets=[0.0, 8.0]), CheckpointError, "rising"),
    ("offsets are beyond 64 bits", tensor(offsets=[2**70, 2**70 + 8]), CheckpointError, "leaves a hole"),
    ("a hole at the start", header({"one": entry(offsets=[8, 16])}, b"\0" * 16), CheckpointError, "leaves a hole"),
    ("a hole between", header({"one": ONE, "x": entry(offsets=[12, 20])}, b"\0" * 20), CheckpointError, "leaves a hole"),
    ("an overlap", header({"one": ONE, "x": entry(offsets=[4, 12])}, b"\0" * 12), CheckpointError, "overlaps"),
    ("the same bytes twice", header({"one": ONE, "x": ONE}), CheckpointError, "overlaps"),
    # the index
    *[(f"index points to {ascii(name)[:40]}", points_to(name), CheckpointError, "not the name of a file") for name in OUTSIDE],
    ("index points to a number", points_to(7), CheckpointError, "expected a file name"),
    ("index points to null", points_to(None), CheckpointError, "expected a file name"),
    ("index points to a list", points_to(["a.safetensors"]), CheckpointError, "expected a file name"),
    ("index points to the config", points_to("config.json"), CheckpointError, "expected a .safetensors file"),
    ("percent-encoded way out", points_to("%2e%2e%2fbait.safetensors"), CheckpointError, "no such file"),
    ("shard is a link out of the folder", link("a.safetensors", "../bait.safetensors"), CheckpointError, "leads out"),
    ("shard is an absolute link", link("a.safetensors", "/etc/hostname"), CheckpointError, "leads out"),
    ("shard is a link to itself", link("a.safetensors", "a.safetensors"), CheckpointError, "a.safetensors"),
    ("shard is a dangling link", link("a.safetensors", "gone.safetensors"), CheckpointError, "no such file"),
    ("shard is a link into a fake cache", link("a.safetensors", "../blobs/bait"), CheckpointError, "a.safetensors"),
    ("index is a link out of the folder", link("model.safetensors.index.json", "../bait.safetensors"), CheckpointError, "leads out"),
    ("config is a link out of the folder", link("config.json", "../bait.safetensors"), CheckpointError, "leads out"),
    ("index is no JSON", index("{"), CheckpointError, "JSON"),
    ("index is a list", index("[]"), CheckpointError, "not an object"),
    ("index without a weight map", index("{}"), CheckpointError, "weight_map"),
    ("empty weight map", index('{"weight_map": {}}'), CheckpointError, "non-empty"),
    ("a key twice in the weight map", index('{"weight_map": {"one": "a.safetensors", "one": "b.safetensors"}}'), CheckpointError, "stands twice"),
    ("index names a tensor no shard has", edit_index(one="a.safetensors", two="b.safetensors", three="b.safetensors"), CheckpointError, "no shard"),
    ("index swaps the shards", edit_index(one="b.safetensors", two="a.safetensors"), CheckpointError, "expected it in b.safetensors"),
    ("index lacks a tensor of a shard", lambda m: header({"one": ONE, "x": entry(offsets=[8, 16])}, b"\0" * 16)(m), CheckpointError, "others"),
    ("a tensor in two shards", header({"two": TWO}), CheckpointError, "a.safetensors and b.safetensors"),
    ("index and single file disagree", lambda m: (m / "model.safetensors").write_bytes(raw_file({"one": ONE}, b"\0" * 8)), CheckpointError, "two sets"),
    # the folder
    ("no weights", only("notes.md"), ModelNotFoundError, "no weights"),
    ("only an adapter", only("adapter_model.safetensors"), ModelNotFoundError, "adapter_model"),
    ("only GGUF", only("model.gguf"), ModelNotFoundError, "model.gguf"),
    ("no config", drop("config.json"), ModelNotFoundError, "config.json"),
    # config.json and its sibling
    ("empty config", config(""), ConfigError, "JSON"),
    ("config is no JSON", config("{model_type: llama}"), ConfigError, "JSON"),
    ("config is a list", config("[]"), ConfigError, "list, not an object"),
    ("config is text", config('"llama"'), ConfigError, "str, not an object"),
    ("config is null", config("null"), ConfigError, "not an object"),
    ("config has a key twice", config('{"rope_theta": 1, "rope_theta": 2}'), ConfigError, "'rope_theta' stands twice"),
    ("config has a key twice inside", config('{"a": [{"b": 1, "b": 1}]}'), ConfigError, "'b' stands twice"),
    ("config has NaN", config('{"eps": NaN}'), ConfigError, "NaN"),
    ("config has Infinity", config('{"eps": -Infinity}'), ConfigError, "Infinity"),
    ("config has 1e999", config('{"eps": 1e999}'), ConfigError, "double"),
    ("config has a comment", config('{"a": 1} // llama'), ConfigError, "JSON"),
    ("config is Latin-1", config(b'{"a": "\xe9"}'), ConfigError, "UTF-8"),
    ("config is UTF-16", config('{"a": 1}'.encode("utf-16")), ConfigError, "UTF-8"),
    ("config has a byte order mark", config(b'\xef\xbb\xbf{"a": 1}'), ConfigError, "JSON"),
    ("config nests without end", config('{"a":' * 100_000), ConfigError, "nested"),
    ("config has an integer of 5000 digits", config(f'{{"a": {BIG}}}'), ConfigError, "digits"),
    ("config is a folder", make_dir("config.json"), ConfigError, "cannot be read"),
    ("generation config is a list", lambda m: (m / "generation_config.json").write_text("[]"), ConfigError, "not an object"),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("mutate", "error", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_is_refused_with_what_why_and_what_to_do(
    mutate: Mutate, error: type[ModelError], words: str, folder: Path
) -> None:
    mutate(folder)
    before = sorted(path.name for path in folder.parent.rglob("*"))
    with pytest.raises(error) as caught:
        open_folder(folder)
    assert words in str(caught.value)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix
    assert str(folder) in caught.value.path
    assert len(str(caught.value)) < 2000
    assert sorted(path.name for path in folder.parent.rglob("*")) == before


def test_the_folder_of_the_table_is_sound_before_it_is_damaged(folder: Path) -> None:
    assert sorted(open_folder(folder).tensors) == ["one", "two"]


def test_the_table_has_at_least_sixty_rows_of_different_names() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize("name", ["gone", "gone/deeper", "file.txt"])
def test_a_folder_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ModelNotFoundError, match=name):
        open_folder(tmp_path / name)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".PT", ".pkl"])
def test_a_pickle_is_refused_by_its_name_before_it_is_opened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can run any code"):
        read_header(tmp_path / f"never-there{suffix}")


@pytest.mark.timeout(60)
def test_more_than_a_million_tensors_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    text = b'{"a":[' + b'"data_offsets",' * 1_000_001 + b"0]}"
    (tmp_path / "m.safetensors").write_bytes(raw_file(text))
    with pytest.raises(CheckpointError, match="1,000,000 tensors"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(folder: Path) -> None:
    (folder / "a.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="Permission"):
        open_folder(folder)


def test_no_pickle_is_ever_loaded(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (os.mkdir, (str(folder.parent / "exploded"),))

    shard(pickle.dumps(Bomb(), 4))(folder)
    with pytest.raises(CheckpointError):
        open_folder(folder)
    assert not (folder.parent / "exploded").exists()
