"""`pluglm vendor --kernel` against a Hub on the loopback: from a commit to a governed backend, and what must not pass."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import py_compile
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any
from zipfile import ZipFile

import pytest
import torch

import pluglm
from pluglm.cli.main import main
from pluglm.contracts import AttentionRequest
from pluglm.errors import ConfigError, PluginError, UnsupportedRequestError
from pluglm.testing.attention_oracle import LAYOUTS, case_of, expected, spec_of

_spec = importlib.util.spec_from_file_location(
    "hub_server", Path(__file__).parents[1] / "core" / "hub_server.py"
)  # fmt: skip
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look their module up
_spec.loader.exec_module(hub_server)
COMMIT = hub_server.COMMIT
SOURCE = f"hub:org/Zq-Attn@{COMMIT}"
UNIVERSAL = "build/torch-universal"

INIT = b'''\
"""FlashAttention's functions in plain torch."""

from .zq_plain import over_batch, over_pieces


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
):
    return over_batch(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
):
    return over_pieces(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, alibi_slopes)
'''
PLAIN = b"""\
import torch


def one(q, k, v, scale, causal, window, softcap, slopes):
    T, H, _ = q.shape
    S, K, _ = k.shape
    far = torch.arange(T, device=q.device)[:, None] + S - T - torch.arange(S, device=q.device)
    s = torch.einsum("thd,shd->hts", q.double(), k.double().repeat_interleave(H // K, 1)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * far.abs()
    seen = torch.ones_like(far, dtype=torch.bool)
    if causal:
        seen &= far >= 0
    if window[0] >= 0:
        seen &= far <= window[0]
    p = s.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("hts,shd->thd", p, v.double().repeat_interleave(H // K, 1)).to(q.dtype)


def over_batch(q, k, v, *how):
    return torch.stack([one(*row, *how) for row in zip(q, k, v)])


def over_pieces(q, k, v, q_starts, k_starts, *how):
    q_sizes, k_sizes = q_starts.diff().tolist(), k_starts.diff().tolist()
    parts = zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes))
    return torch.cat([one(*part, *how) for part in parts])
"""
BINARY = b"\x7fELF\x02\x01\x01\0" + bytes(range(256))
FILES = {
    "README.md": b"# Attention",
    "LICENSE": b"Apache License",
    "config.json": b"{}",
    "torch-ext/setup.py": b"raise SystemExit",
    f"{UNIVERSAL}/__init__.py": INIT,
    f"{UNIVERSAL}/zq_plain.py": PLAIN,
    f"{UNIVERSAL}/metadata.json": b'{"version": 1, "python-depends": ["packaging"]}',
    f"{UNIVERSAL}/zq_table.bin": BINARY,
    f"{UNIVERSAL}/__pycache__/zq_plain.cpython-311.pyc": b"\0",
    "build/torch21-cxx11-cu118-x86_64-linux/__init__.py": b"from ._zq_ops import *\n",
    "build/torch21-cxx11-cu118-x86_64-linux/_zq_ops.abi3.so": BINARY,
}
PARTS = sorted(name for name in FILES if name.startswith(UNIVERSAL) and "__pycache__" not in name)
TAKEN = sorted([*PARTS, "README.md", "LICENSE"])


@dataclass(frozen=True)
class Result:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """An input on which somebody answers."""

    def isatty(self) -> bool:
        return True


Run = Callable[..., Result]


@pytest.fixture(params=["kernel", "model"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def repo() -> Any:
    return hub_server.Repo(dict(FILES), kind="kernel")


@pytest.fixture
def hub(repo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PLUGLM_CONFIG_DIR", str(tmp_path / "config"))
    with hub_server.HubServer({"org/Zq-Attn": repo}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def run(hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`pluglm vendor --kernel …` in this process; `answer` is what somebody at a terminal types."""

    def call(*arguments: str | Path, answer: str | None = None) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO() if answer is None else Terminal(answer + "\n"))
        with pytest.raises(SystemExit) as end:
            main(["vendor", *map(str, arguments), "--kernel", "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, printed.out, printed.err)

    yield call
    assert not [name for name in sys.modules if "zq_" in name], "a kernel was imported"


def wheels(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out").glob("*.whl"))


def folder_of(place: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


# From the Hub to a wheel


def test_one_build_of_a_commit_is_fetched_shown_and_built(
    run: Run, hub: Any, repo: Any, kind: str, tmp_path: Path
) -> None:
    repo.kind = kind
    result = run(SOURCE, "--yes")
    assert (result.code, result.err) == (0, "")
    assert sorted(hub.fetched()) == TAKEN
    (wheel,) = wheels(tmp_path)
    assert wheel.name == "pluglm_kernel_zq_attn-1.0+g0123456789ab.torch.universal-py3-none-any.whl"
    shown = " ".join(result.out.split())
    for name in TAKEN:
        assert f"{hashlib.sha256(FILES[name]).hexdigest()} {len(FILES[name])} {name}" in shown
    for line in (
        "plugin pluglm-kernel-zq-attn 1.0+g0123456789ab.torch.universal, attention='zq-attn'",
        "variant torch-universal", "others torch21-cxx11-cu118-x86_64-linux", "licence LICENSE: Apache License",
        f"{len(BINARY)} {UNIVERSAL}/zq_table.bin (binary; cannot be read: trust the publisher)",
        "1 file is compiled.", "pluglm-attention-flash>=0.1,<0.2", "packaging (installed:", "is no sandbox",
    ):  # fmt: skip
        assert line in shown, line
    assert shown.count("cannot be read") == 1


def test_the_wheel_is_sealed_deterministic_and_ordered_as_a_third_party_one(run: Run, hub: Any, tmp_path: Path) -> None:
    from pluglm_vendor.kernel import FACTS

    run(SOURCE, "--yes")
    first = wheels(tmp_path)[0].read_bytes()
    hub.log.clear()
    assert run(SOURCE, "--yes").code == 0
    assert wheels(tmp_path)[0].read_bytes() == first
    assert hub.log == []  # nothing is asked again, not even for the list
    with ZipFile(wheels(tmp_path)[0]) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    package = "pluglm_kernel_zq_attn"
    record = json.loads(content[f"{package}/kernel.json"])
    assert record["files"] == {name: hashlib.sha256(FILES[name]).hexdigest() for name in PARTS}
    assert (record["commit"], record["variant"]) == (COMMIT, "torch-universal")
    assert all(content[f"{package}/kernel/{name}"] == FILES[name] for name in PARTS)
    (facts,) = json.loads(content[f"{package}/pluglm.json"])["providers"]
    flash = Path(importlib.util.find_spec("pluglm_attention_flash").origin).with_name("pluglm.json")  # type: ignore[union-attr, arg-type]
    (theirs,) = json.loads(flash.read_text())["providers"]
    assert {key: facts[key] for key in FACTS} == {key: theirs[key] for key in FACTS} | {"tier": "portable"}
    (points,) = (data for name, data in content.items() if name.endswith("entry_points.txt"))
    assert points == b"[pluglm.attention]\nzq-attn = pluglm_kernel_zq_attn\n"


def test_a_build_that_is_named_is_taken_and_says_its_platform_and_torch(
    run: Run, hub: Any, repo: Any, tmp_path: Path
) -> None:
    repo.files["build/torch21-cxx11-cu118-x86_64-linux/__init__.py"] = INIT.replace(b".zq_plain", b"._zq_ops")
    assert run(SOURCE, "--yes", "--variant", "torch21-cxx11-cu118-x86_64-linux").code == 0
    (wheel,) = wheels(tmp_path)
    assert wheel.name.endswith(".torch21.cxx11.cu118.x86.64.linux-py3-none-linux_x86_64.whl")
    with ZipFile(wheel) as archive:
        facts = json.loads(archive.read("pluglm_kernel_zq_attn/pluglm.json"))["providers"][0]
        assert b"Root-Is-Purelib: false\nTag: py3-none-linux_x86_64\n" in archive.read(
            next(name for name in archive.namelist() if name.endswith("/WHEEL"))
        )
    assert facts["requires"]["torch"] == "==2.1.*"
    assert not any("universal" in name for name in hub.fetched())


def test_a_folder_of_the_same_layout_is_vendored_by_its_digest(run: Run, tmp_path: Path) -> None:
    place = folder_of(tmp_path / "Zq-Folder", FILES)
    result = run(place, "--yes", "--json")
    said = json.loads(result.out)
    assert (said["source"], said["commit"], said["variant"]) == ("dir:Zq-Folder", None, "torch-universal")
    assert said["files"][f"{UNIVERSAL}/zq_table.bin"]["binary"] is True
    (place / UNIVERSAL / "link.py").symlink_to(place / "LICENSE")
    assert "is a symbolic link" in run(place, "--yes").err


def test_after_the_first_time_no_hub_is_needed_and_before_it_one_is(
    run: Run, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"ModelNotFoundError: {SOURCE} was not fetched before." in run(SOURCE, "--yes").err
    assert hub.log == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    run(SOURCE, answer="n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(SOURCE, "--yes").code == 0
    assert len(wheels(tmp_path)) == 1


# Where nothing may be built


@pytest.mark.parametrize("revision", ["@main", "@v1", ""])
def test_only_a_commit_will_do_and_it_is_told_which(
    run: Run, hub: Any, repo: Any, revision: str, kind: str, tmp_path: Path
) -> None:
    repo.kind, repo.branches = kind, {"v1": COMMIT}
    result = run(f"hub:org/Zq-Attn{revision}", "--yes")
    assert result.code == 1
    assert "A commit of 40 hex digits never changes." in result.err
    assert f"write hub:org/Zq-Attn@{COMMIT}" in result.err
    assert hub.fetched() == wheels(tmp_path) == []


def test_a_branch_that_is_named_like_a_commit_is_found_out_and_its_listing_not_kept(
    run: Run, hub: Any, repo: Any, tmp_path: Path
) -> None:
    repo.claims = {COMMIT: "89abcdef" * 5}
    assert f"the Hub answered for commit {'89abcdef' * 5}, not for {COMMIT}" in run(SOURCE, "--yes").err
    assert not list((tmp_path / "cache").rglob("listing.json"))
    assert "There is no model" in run(f"hub:org/other@{COMMIT}", "--yes").err


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({name: None for name in FILES if name.startswith(UNIVERSAL)}, "no build of `org/Zq-Attn` fits what is installed"),
        ({name: None for name in FILES if name.startswith("build/")}, "does not contain a build of a kernel"),
        ({f"{UNIVERSAL}/__init__.py": None}, "holds no Python package"),
        ({f"{UNIVERSAL}/__init__.py": b"def relu(x): ..."}, "does not define flash_attn_func"),
        ({f"{UNIVERSAL}/zq_plain.py": b"def ("}, "cannot be read as Python in UTF-8"),
        ({f"{UNIVERSAL}/../../evil.py": b""}, "is no plain name of a file"),
        ({f"{UNIVERSAL}/ZQ_plain.py": b""}, "nothing but capitals"),
        ({f"{UNIVERSAL}/large.py": b"#" * (2**22 + 1)}, "large.py has 4194305 bytes"),
        ({f"{UNIVERSAL}/m{i}.txt": b"" for i in range(1024)}, "it has 1028 files"),
        ({f"{UNIVERSAL}/metadata.json": b"["}, "metadata.json is no JSON"),
        ({f"{UNIVERSAL}/metadata.json": b'{"python-depends": ["x @ https://host.invalid/x"]}'}, "of metadata.json of"),
        ({f"{UNIVERSAL}/metadata.json": b'{"kernels-depends": ["org/other"]}'}, "says 'kernels-depends'"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_with_the_reason(
    run: Run, repo: Any, files: dict[str, bytes | None], text: str, tmp_path: Path
) -> None:
    repo.files = {**repo.files, **files}
    repo.files = {name: data for name, data in repo.files.items() if data is not None}
    result = run(SOURCE, "--yes")
    assert result.code == 1
    assert result.err.startswith("InputError: ")
    assert text in result.err
    assert "To do:" in result.err
    assert wheels(tmp_path) == []


def test_a_file_of_another_commit_is_found_out(run: Run, repo: Any) -> None:
    repo.claims = {f"{UNIVERSAL}/zq_plain.py": "89abcdef" * 5}
    assert f"InputError: the Hub answered with {UNIVERSAL}/zq_plain.py of commit 89abcdef" in run(SOURCE, "--yes").err


def test_a_name_that_is_taken_and_options_that_make_no_sense_are_refused(run: Run, tmp_path: Path) -> None:
    assert "PluginConflictError: attention 'flash' is provided already" in run(SOURCE, "--yes", "--name", "flash").err
    assert "'Flash' cannot name an attention kernel" in run(SOURCE, "--yes", "--name", "Flash").err
    done = subprocess.run(
        [sys.executable, "-m", "pluglm.cli", "vendor", SOURCE, "--variant", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "--variant goes with --kernel" in done.stderr) == (2, True)


def test_before_consent_nothing_importable_exists(run: Run, tmp_path: Path) -> None:
    assert run(SOURCE, answer="n").code == 1
    assert "nobody was there to agree to it" in run(SOURCE).err
    assert wheels(tmp_path) == []
    kept = [path for path in (tmp_path / "cache" / "quarantine").rglob("*") if path.is_file()]
    digests = {hashlib.sha256(FILES[name]).hexdigest() for name in TAKEN}
    assert {path.name for path in kept} == digests | {"table-torch-universal.json", "listing.json"}


# Installed: a backend like any other


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which `pluglm vendor --kernel --install` put a kernel of the Hub."""
    place = tmp_path_factory.mktemp("vendored")
    with hub_server.HubServer({"org/Zq-Attn": hub_server.Repo(dict(FILES), kind="kernel")}) as server:
        done = _pluglm(
            ["vendor", SOURCE, "--kernel", "--yes", "--install", "--out", str(place / "out")], place,
            HF_ENDPOINT=server.endpoint, PIP_TARGET=str(place / "site"), HF_HUB_OFFLINE="0",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Installed. Use it: pluglm.load(…, attention='zq-attn')" in done.stdout
    return place / "site"


def _pluglm(arguments: list[str], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-m", "pluglm.cli", *arguments], capture_output=True, text=True, check=False, timeout=120,
        env={**inherited, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1",
             "PLUGLM_CACHE_DIR": str(place / "cache"), "PLUGLM_CONFIG_DIR": str(place / "config"), **environment},
    )  # fmt: skip


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package on the import path of this process; what was imported of it is forgotten afterwards."""
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PLUGLM_CONFIG_DIR", str(tmp_path / "config"))
    place = Path(copytree(site, tmp_path / "site"))
    monkeypatch.syspath_prepend(str(place))
    finders = list(sys.meta_path)
    yield place
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if "pluglm_kernel_" in name]:
        del sys.modules[name]


PACKAGE = "pluglm_kernel_zq_attn"
REQUEST = AttentionRequest((spec_of(["grouped-heads"]),), "cpu", "float32")


def opened(**how: Any) -> Any:
    from pluglm_attention_flash.vendored import open_kernel

    return open_kernel(PACKAGE, **how)


def test_the_commands_about_plugins_know_it_and_it_can_be_switched_off(installed: Path, tmp_path: Path) -> None:
    info = _pluglm(["plugins", "info", "zq-attn"], tmp_path, PYTHONPATH=str(installed))
    assert "vendored from org/Zq-Attn" in info.stdout
    assert "Disabled" in _pluglm(["plugins", "disable", "zq-attn"], tmp_path, PYTHONPATH=str(installed)).stdout


@pytest.mark.parametrize(
    "features", [("grouped-heads",), ("window", "grouped-heads"), ("softcap",), ("alibi",), ("chunk",)]
)
@pytest.mark.parametrize("layout", ["a first prompt", "more tokens", "padding on the left"])
def test_what_it_computes_is_attention(installed: Path, layout: str, features: tuple[str, ...]) -> None:
    from pluglm_attention_flash.flash import build

    kernel = opened(dtypes=("float32",))
    case = case_of(LAYOUTS[layout], spec_of(list(features)))
    backend = build(replace(REQUEST, specs=(case.spec,)), {"": lambda device: kernel}, owner="zq-attn")
    real = (case.q_positions >= 0)[:, None, :, None]
    assert torch.allclose(case.run(backend).double().where(real, 0.0), expected(case).where(real, 0.0), atol=1e-5)
    assert backend.name == "zq-attn"
    assert backend.refusals(spec_of(["sinks"])) == ["sinks: zq-attn has no such thing"]


def test_on_a_cpu_it_is_refused_before_anything_of_it_is_run(installed: Path, folder: Path) -> None:
    from pluglm_attention_flash.vendored import sealed_attention

    with pytest.raises(UnsupportedRequestError, match='attention "zq-attn" cannot honour') as caught:
        sealed_attention(PACKAGE, replace(REQUEST, dtype="bfloat16"))
    assert caught.value.reasons == ("needs a CUDA device, have cpu",)
    with pytest.raises(UnsupportedRequestError, match="it has no variant '2'; it has none"):
        sealed_attention(PACKAGE, replace(REQUEST, variant="2"))
    with pytest.raises(pluglm.PluglmError, match="needs device cuda, have cpu"):
        pluglm.load(folder, attention="zq-attn", device="cpu")
    assert not [name for name in sys.modules if name.startswith("_pluglm_kernel_")]


def test_auto_does_not_take_it_and_what_the_library_left_in_a_config_changes_nothing(
    installed: Path, write_model: Any, tmp_path: Path
) -> None:
    """Keys with an underscore are Transformers' own notes; they are dropped, and read by nobody."""
    model = write_model(tmp_path / "model", config={"_attn_implementation": "zq-attn"})
    plain = write_model(tmp_path / "plain")
    named, unnamed = (pluglm.load(place, device="cpu") for place in (model, plain))
    assert named.plan["attention"].provider == unnamed.plan["attention"].provider
    assert named.plan["attention"].provider.startswith("pluglm-attention-")
    first, second = (lm.complete([5, 6, 8], max_new_tokens=3) for lm in (named, unnamed))
    assert first.token_ids == second.token_ids  # type: ignore[union-attr]
    assert PACKAGE not in sys.modules


@pytest.mark.parametrize("key", ["attn_implementation", "use_kernels"])
def test_a_config_that_names_a_kernel_is_refused_by_the_key(
    installed: Path, write_model: Any, tmp_path: Path, key: str
) -> None:
    model = write_model(tmp_path / "model", config={key: "org/Zq-Attn"})
    with pytest.raises(ConfigError, match=f'says what nothing here can honour: "{key}"') as caught:
        pluglm.load(model, device="cpu")
    assert "'org/Zq-Attn' is read by nobody" in caught.value.why
    assert PACKAGE not in sys.modules


# The seal


@pytest.mark.parametrize("name", ["zq_plain.py", "zq_table.bin", "metadata.json", "__init__.py"])
def test_one_changed_bit_of_any_file_stops_it_before_the_import(installed: Path, name: str) -> None:
    file = installed / PACKAGE / "kernel" / UNIVERSAL / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(PluginError, match="is not as it was vendored; nothing of the kernel was run") as caught:
        opened()
    assert caught.value.path == f"kernel/{UNIVERSAL}/{name}"
    assert "its sha256 is" in caught.value.why
    assert "pluglm vendor SOURCE --kernel --install" in caught.value.fix
    assert not [name for name in sys.modules if name.startswith("_pluglm_kernel_")]


def test_a_file_that_was_not_vendored_and_one_that_is_gone_stop_it(installed: Path) -> None:
    place = installed / PACKAGE / "kernel" / UNIVERSAL
    (place / "torch.py").write_text("raise SystemExit")
    with pytest.raises(PluginError, match=r"torch\.py of pluglm-kernel-zq-attn is not as") as caught:
        opened()
    assert "not in the list" in caught.value.why
    (place / "torch.py").unlink()
    (place / "zq_table.bin").unlink()
    with pytest.raises(PluginError, match=r"zq_table\.bin") as caught:
        opened()
    assert "cannot be read" in caught.value.why


def test_compiled_python_beside_the_files_is_not_read(installed: Path) -> None:
    """A cache file with the right time and size, and other code in it, is what a usual import would run."""
    file = installed / PACKAGE / "kernel" / UNIVERSAL / "zq_plain.py"
    whole, when = file.read_bytes(), file.stat()
    evil = b"raise SystemExit('compiled')"
    file.write_bytes(evil + b"\n" + b"#" * (len(whole) - len(evil) - 1))
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    py_compile.compile(str(file), doraise=True)
    file.write_bytes(whole)
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert not isinstance(opened(), str)


def reseal(installed: Path, changed: dict[str, bytes]) -> None:
    """As if these files had been vendored so."""
    from pluglm.vendored import table_digest

    record = installed / PACKAGE / "kernel.json"
    said = json.loads(record.read_text())
    for name, data in changed.items():
        (installed / PACKAGE / "kernel" / name).write_bytes(data)
        said["files"][name] = hashlib.sha256(data).hexdigest()
    said["digest"] = table_digest(said["files"])
    record.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (b"import zq_missing", "ModuleNotFoundError: No module named 'zq_missing'"),
        (b"from . import zq_absent", "ImportError: cannot import name 'zq_absent'"),
        (b"import os\nfrom . import zq_plain\nraise OSError('libcudart.so.13: cannot open')", "libcudart.so.13"),
    ],
)
def test_an_import_that_fails_is_told_with_its_cause_and_leaves_nothing(
    installed: Path, source: bytes, text: str
) -> None:
    reseal(installed, {f"{UNIVERSAL}/__init__.py": source})
    before = list(sys.meta_path)
    with pytest.raises(PluginError, match="the kernel of pluglm-kernel-zq-attn cannot be imported") as caught:
        opened()
    assert text in caught.value.why
    assert isinstance(caught.value.__cause__, Exception)
    assert torch.__version__ in caught.value.fix
    assert not [name for name in sys.modules if name.startswith("_pluglm_kernel_")]
    assert sys.meta_path == before


def test_a_compiled_library_is_imported_from_its_compared_file(installed: Path) -> None:
    library = importlib.util.find_spec("_bisect")
    if library is None or library.origin is None or not library.has_location:
        pytest.skip("this interpreter has no extension module in a file")
    name = f"{UNIVERSAL}/{Path(library.origin).name}"
    source = INIT + b"\nfrom . import _bisect as ops\n"
    reseal(installed, {name: Path(library.origin).read_bytes(), f"{UNIVERSAL}/__init__.py": source})
    assert opened().variant == "2"
    (module,) = (module for known, module in sys.modules.items() if known.endswith("._bisect"))
    assert module.__file__ == str(installed / PACKAGE / "kernel" / name)
    assert module.bisect_left([1, 3], 2) == 1


def test_a_missing_function_and_missing_parameters_are_named(installed: Path) -> None:
    reseal(installed, {f"{UNIVERSAL}/__init__.py": INIT.replace(b"def flash_attn_varlen_func", b"def other")})
    with pytest.raises(PluginError, match="has no function flash_attn_varlen_func"):
        opened()
    reseal(installed, {f"{UNIVERSAL}/__init__.py": INIT.replace(b"softcap=0.0, ", b"").replace(b" softcap,", b" 0.0,")})
    assert opened() == "its functions do not take softcap"


def test_a_package_in_the_older_place_is_found_and_one_is_run_once(installed: Path) -> None:
    folder = installed / PACKAGE / "kernel" / UNIVERSAL
    (folder / "zq_attn").mkdir()
    moved = {f"{UNIVERSAL}/zq_attn/{name}": FILES[f"{UNIVERSAL}/{name}"] for name in ("__init__.py", "zq_plain.py")}
    record = installed / PACKAGE / "kernel.json"
    said = json.loads(record.read_text())
    for name in ("__init__.py", "zq_plain.py"):
        (folder / name).unlink()
        del said["files"][f"{UNIVERSAL}/{name}"]
    record.write_text(json.dumps(said))
    reseal(installed, moved)
    opened()
    modules = {name for name in sys.modules if name.startswith("_pluglm_kernel_")}
    assert len(modules) == 2
    opened()
    assert {name for name in sys.modules if name.startswith("_pluglm_kernel_")} == modules


def test_a_gpu_that_the_build_was_not_compiled_for_is_refused(monkeypatch: pytest.MonkeyPatch, installed: Path) -> None:
    from pluglm_attention_flash.vendored import compiled_for

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for fits in ("8.9", "8.0", "7.0+PTX"):
        assert compiled_for((fits,), "cuda") is None
    for other in ("9.0", "9.0a", "7.5", "8.0a"):
        assert compiled_for((other,), "cuda") is not None
    said = b'{"backend": {"type": "cuda", "archs": ["9.0a"]}}'
    reseal(installed, {f"{UNIVERSAL}/metadata.json": said})
    assert opened(device="cuda") == "it was compiled for compute capability 9.0a, and cuda has 8.9"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("layout", ["a first prompt", "more tokens", "padding on the left"])
def test_on_cuda_the_vendored_kernel_agrees_with_eager(installed: Path, layout: str) -> None:
    import pluglm_attention_eager
    from pluglm_attention_flash.vendored import sealed_attention

    case = case_of(LAYOUTS[layout], spec_of(["window", "grouped-heads"]), dtype=torch.bfloat16, device="cuda")
    request = AttentionRequest((case.spec,), "cuda", "bfloat16")
    ours = case.run(sealed_attention(PACKAGE, request))
    theirs = case.run(pluglm_attention_eager.pluglm_build_attention(request=request))
    real = (case.q_positions >= 0)[:, None, :, None]
    assert torch.allclose(ours.where(real, 0.0), theirs.where(real, 0.0), atol=1e-2, rtol=1e-2)
