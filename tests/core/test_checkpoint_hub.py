"""`resolve` against the real huggingface_hub client and a Hub on the loopback."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pluglm.checkpoint import open_folder, resolve
from pluglm.errors import CheckpointError, InputError, ModelError, ModelNotFoundError, PluglmError

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look their module up
_spec.loader.exec_module(hub_server)
COMMIT = hub_server.COMMIT


def _weights(count: int = 5) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * (4 * count)


def _model_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": _weights(),
        "tokenizer.json": b"{}",
        "merges.txt": b"a b",
        "chat_template.jinja": b"{{ x }}",
        "README.md": b"read me",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04.",
        "consolidated.safetensors": b"x" * 50,
        "onnx/config.json": b"{}",
        "original/model.safetensors": b"x" * 50,
    }


@pytest.fixture
def repo() -> Any:
    return hub_server.Repo(_model_files())


@pytest.fixture
def hub(repo: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.HubServer({"org/model": repo}) as server:
        yield server


@pytest.fixture
def get(hub: Any, tmp_path: Path) -> Any:
    def call(model: str = "org/model", **options: Any) -> Path:
        return resolve(model, **{"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", **options})

    return call


def _dead_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def _incomplete(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_model_on_the_hub_is_fetched_and_opens(get: Any, hub: Any) -> None:
    checkpoint = open_folder(get())
    assert checkpoint.tensor("w").tolist() == [0.0] * 5
    assert checkpoint.file("tokenizer.json") is not None
    assert (checkpoint.path / "model.safetensors").is_symlink()  # the cache's own layout, which is let through


def test_only_data_of_the_top_level_is_fetched(get: Any, hub: Any) -> None:
    get()
    assert sorted(hub.fetched()) == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_second_load_fetches_nothing_again(get: Any, hub: Any) -> None:
    first = get()
    hub.log.clear()
    assert get() == first
    assert hub.fetched() == []


def test_a_cached_commit_is_used_without_any_request(get: Any, hub: Any) -> None:
    first = get(revision=COMMIT)
    hub.log.clear()
    assert get(revision=COMMIT) == first
    assert hub.log == []


def test_offline_uses_the_cache_and_makes_no_request(get: Any, hub: Any) -> None:
    first = get()
    hub.log.clear()
    assert get(offline=True) == first
    assert hub.log == []


def test_offline_without_a_cached_copy_says_how_to_get_one(get: Any, hub: Any) -> None:
    with pytest.raises(ModelNotFoundError, match=r"not in the local cache[\s\S]*offline=False"):
        get(offline=True)
    assert hub.log == []


def test_the_offline_variable_of_the_hub_client_is_honoured(
    get: Any, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="not in the local cache"):
        get()
    assert hub.log == []


def test_an_incomplete_cached_copy_is_not_used_offline(get: Any) -> None:
    folder = get()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"incomplete|not in the local cache"):
        get(offline=True)


def test_an_interrupted_download_resumes_at_the_last_whole_chunk(
    get: Any, hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    repo.files["model.safetensors"] = _weights(50_000)
    repo.cut["model.safetensors"] = 100_000
    folder = get()
    assert (folder / "model.safetensors").read_bytes() == repo.files["model.safetensors"]
    ranges = [
        wanted for method, path, wanted in hub.log if method == "GET" and path.endswith("model.safetensors") and wanted
    ]
    assert ranges == ["bytes=100000-"]


def test_a_hub_that_does_not_answer_gives_the_cached_copy_with_a_warning(
    get: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = get()
    with caplog.at_level(logging.WARNING, logger="pluglm"):
        assert get(endpoint=_dead_endpoint()) == first
    assert "as cached" in caplog.text


def test_a_failing_hub_gives_the_cached_copy_with_a_warning(
    get: Any, repo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = get()
    repo.answers[("GET", "info")] = (503, {})
    with caplog.at_level(logging.WARNING, logger="pluglm"):
        assert get() == first
    assert "503" in caplog.text


def test_a_cached_copy_does_not_hide_that_access_was_withdrawn(get: Any, repo: Any) -> None:
    get()
    repo.answers[("GET", "info")] = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(ModelError, match="gated"):
        get()


def test_the_token_is_in_no_message(get: Any, repo: Any) -> None:
    repo.answers[("GET", "info")] = (401, {})
    with pytest.raises(ModelError) as caught:
        get(token="hf_secretsecret")
    assert "hf_secret" not in str(caught.value)


HUB_FAILURES: list[tuple[str, dict[str, Any], dict[str, Any], type[PluglmError], str]] = [
    ("unknown repository", {}, {"model": "org/other"}, ModelNotFoundError, r'no model "org/other"'),
    ("one-word repository", {}, {"model": "other"}, ModelNotFoundError, r'no model "other"'),
    ("unknown revision", {}, {"revision": "v9"}, ModelNotFoundError, r'no revision "v9"'),
    ("unknown commit", {}, {"revision": "f" * 40}, ModelNotFoundError, "no revision"),
    ("private", {"answers": {("GET", "info"): (401, {})}}, {}, ModelNotFoundError, r"private[\s\S]*token="),
    (
        "bad token",
        {"answers": {("GET", "info"): (401, {"X-Error-Message": "Invalid credentials in Authorization header"})}},
        {},
        ModelNotFoundError,
        "token=",
    ),
    ("gated", {"answers": {("GET", "info"): (403, {"X-Error-Code": "GatedRepo"})}}, {}, ModelError, "conditions"),
    ("forbidden", {"answers": {("GET", "info"): (403, {})}}, {}, ModelError, "conditions"),
    (
        "gated at the file",
        {"answers": {("HEAD", "config.json"): (403, {"X-Error-Code": "GatedRepo"})}},
        {},
        ModelError,
        "gated",
    ),
    ("server error", {"answers": {("GET", "info"): (500, {})}}, {}, ModelError, "status 500"),
    ("rate limited", {"answers": {("GET", "info"): (429, {})}}, {}, ModelError, "status 429"),
    (
        "gone between listing and download",
        {"answers": {("HEAD", "config.json"): (404, {"X-Error-Code": "EntryNotFound"})}},
        {},
        ModelError,
        "404",
    ),
    ("file forbidden on download", {"answers": {("GET", "model.safetensors"): (403, {})}}, {}, ModelError, "gated"),
    ("wrong size", {"wrong_size": {"model.safetensors": 5000}}, {}, ModelError, "size"),
    ("nothing listens", {}, {"endpoint": "dead"}, ModelError, r"cannot be reached[\s\S]*offline=True"),
    ("nothing listens, commit", {}, {"endpoint": "dead", "revision": "a" * 40}, ModelError, "cannot be reached"),
    ("no such host", {}, {"endpoint": "http://host.invalid"}, ModelError, "cannot be reached"),
    (
        "only pickles",
        {"files": {"config.json": b"{}", "pytorch_model.bin": b"\x80"}},
        {},
        CheckpointError,
        r"pytorch_model\.bin",
    ),
    ("only gguf", {"files": {"m.gguf": b"GGUF"}}, {}, CheckpointError, r"m\.gguf[\s\S]*format"),
    ("no weights at all", {"files": {"README.md": b""}}, {}, CheckpointError, "no safetensors"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("faults", "options", "error", "text"), [row[1:] for row in HUB_FAILURES], ids=[row[0] for row in HUB_FAILURES]
)
def test_every_failure_of_the_hub_is_a_typed_error_that_says_what_to_do(
    faults: dict[str, Any],
    options: dict[str, Any],
    error: type[PluglmError],
    text: str,
    get: Any,
    repo: Any,
    tmp_path: Path,
) -> None:
    for name, value in faults.items():
        setattr(repo, name, value)
    if options.get("endpoint") == "dead":
        options = {**options, "endpoint": _dead_endpoint()}
    with pytest.raises(error, match=text) as caught:
        get(**options)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix
    assert caught.value.__cause__ is not None or isinstance(caught.value, CheckpointError)
    assert _incomplete(tmp_path) == []
    assert not any(path.name.startswith("evil") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "name", ["../../evil.json", "/evil.json", "a/../../evil.json", "x/evil.safetensors", "./evil.json"]
)
def test_a_name_with_a_folder_in_the_listing_is_never_fetched(
    name: str, get: Any, hub: Any, repo: Any, tmp_path: Path
) -> None:
    repo.extra = [name]
    get()
    assert not any("evil" in fetched for fetched in hub.fetched())
    assert not any(path.name.startswith("evil") for path in tmp_path.rglob("*"))


def test_a_full_disk_is_named(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(ModelError, match=r"disk is full[\s\S]*cache_dir="):
        get()


def test_an_existing_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize(
    "name", ["./gone", "/gone", "~/gone-folder", "a/b/c", "..\\gone", "C:\\gone", "~nobody-here/x"]
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(name: str, get: Any, hub: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="written like a path"):
        get(name)
    assert hub.log == []


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "org/na me", "org/..x", "org--x", "org/", "ö/x", "https:x"])
def test_a_name_that_cannot_be_one_is_refused_before_any_request(name: str, get: Any, hub: Any) -> None:
    with pytest.raises((InputError, ModelNotFoundError), match="To do"):
        get(name)
    assert hub.log == []


def test_a_file_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="a file, not a folder"):
        resolve(str(tmp_path / "m.safetensors"))
