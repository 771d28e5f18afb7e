"""`pluglm vendor` against a Hub on the loopback: from a repository to a governed plugin, and every way that must end."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any
from zipfile import ZipFile

import pytest

import pluglm
from pluglm.cli.main import main
from pluglm.errors import InputError, PluginConflictError, PluginDisabledError, PluginError, PluginNotFoundError
from pluglm.vendored import read_recipe, vendored_name

_spec = importlib.util.spec_from_file_location(
    "hub_server", Path(__file__).parents[1] / "core" / "hub_server.py"
)  # fmt: skip
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look their module up
_spec.loader.exec_module(hub_server)
COMMIT = hub_server.COMMIT
OLDER = "89abcdef" * 5
SOURCE = f"hub:org/Zq_Echo@{COMMIT}"
NO_RECIPE = (
    "`{}` does not contain a `custom_generate` subdirectory with a `generate.py` file, can't load the custom generate "
    "function."
)

GENERATE = b'''\
import torch

from .zq_helper import longest


def generate(model, input_ids, generation_config=None, favourite=7, **kwargs):
    """As many copies of one token as are asked for."""
    count = longest(generation_config)
    return torch.cat((input_ids, input_ids.new_full((input_ids.shape[0], count), favourite)), dim=1)
'''
HELPER = b"def longest(config):\n    return config.max_new_tokens\n"
FILES = {
    "README.md": b"---\ntags: [custom_generate]\n---\n# Echo",
    "LICENSE": b"\nMIT License\nmore",
    "config.json": b"{}",
    "model.safetensors": b"x",
    "setup.py": b"raise SystemExit",
    "other/generate.py": b"raise SystemExit",
    "custom_generate/generate.py": GENERATE,
    "custom_generate/zq_helper.py": HELPER,
    "custom_generate/requirements.txt": b"torch>=2.0,!=2.1.*\nnumpy[none]; python_version < '3'\n",
    "custom_generate/notes.md": b"notes",
    "custom_generate/__pycache__/generate.cpython-311.pyc": b"\0",
}
TAKEN = [
    "LICENSE", "README.md", "custom_generate/generate.py", "custom_generate/requirements.txt",
    "custom_generate/zq_helper.py",
]  # fmt: skip
#: A second recipe: no helper, no requirements, no licence.
PLAIN = {"custom_generate/generate.py": b"def generate(model, input_ids, **kwargs):\n    return input_ids\n"}


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


@pytest.fixture
def repo() -> Any:
    return hub_server.Repo(dict(FILES), branches={"v1": OLDER}, history={OLDER: {**FILES, **PLAIN}})


@pytest.fixture
def hub(repo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PLUGLM_CONFIG_DIR", str(tmp_path / "config"))
    with hub_server.HubServer({"org/Zq_Echo": repo}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def run(hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`pluglm vendor …` in this process; `answer` is what somebody at a terminal types."""

    def call(*arguments: str | Path, answer: str | None = None) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO() if answer is None else Terminal(answer + "\n"))
        with pytest.raises(SystemExit) as end:
            main(["vendor", *map(str, arguments), "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, printed.out, printed.err)

    yield call
    assert not [name for name in sys.modules if "zq_" in name], "a recipe was imported"


def wheels(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else []


def folder_of(place: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


# From the Hub to a wheel


def test_a_commit_is_fetched_shown_and_built_and_only_the_recipe_is_fetched(run: Run, hub: Any, tmp_path: Path) -> None:
    result = run(SOURCE, "--yes")
    assert (result.code, result.err) == (0, "")
    assert sorted(hub.fetched()) == TAKEN
    assert [path.name for path in wheels(tmp_path)] == ["pluglm_recipe_zq_echo-1.0+g0123456789ab-py3-none-any.whl"]
    shown = " ".join(result.out.split())
    for name in TAKEN:
        assert f"{hashlib.sha256(FILES[name]).hexdigest()} {len(FILES[name])} {name}" in shown
    for line in (
        f"source {SOURCE}", f"commit {COMMIT}", "plugin pluglm-recipe-zq-echo 1.0+g0123456789ab, decoding='zq-echo'",
        "licence LICENSE: MIT License", "imports torch requires", "not taken notes.md",
        "numpy[none]; python_version < '3' (installed:", "not needed here", "nothing that its text shows",
        "is no sandbox", "pip install", "pluglm plugins info zq-echo",
    ):  # fmt: skip
        assert line in shown


def test_a_question_is_asked_and_only_a_yes_builds(run: Run, tmp_path: Path) -> None:
    for answer in ("", "n", "no"):
        result = run(SOURCE, answer=answer)
        assert result.code == 1
        assert "Build a plugin from this code? [y/N]" in result.out
        assert "Nothing was built." in result.err
        assert wheels(tmp_path) == []
    assert run(SOURCE, answer="y").code == 0
    assert len(wheels(tmp_path)) == 1


def test_without_a_terminal_silence_is_no_consent(run: Run, tmp_path: Path) -> None:
    result = run(SOURCE)
    assert result.code == 1
    assert "InputError: nothing was built: nobody was there to agree to it." in result.err
    assert "--yes once you have read the code" in result.err
    assert wheels(tmp_path) == []


def test_the_answer_in_advance_prints_the_same(run: Run) -> None:
    asked, told = run(SOURCE, answer="n"), run(SOURCE, "--yes")
    assert told.out.startswith(asked.out.partition("\nBuild a plugin")[0].rstrip())


def test_json_says_all_that_is_shown_and_the_page_goes_to_the_error_stream(run: Run, tmp_path: Path) -> None:
    result = run(SOURCE, "--yes", "--json", "--name", "mine")
    said = json.loads(result.out)
    assert (said["source"], said["commit"], said["name"]) == (SOURCE, COMMIT, "mine")
    assert said["wheel"] == str(wheels(tmp_path)[0])
    assert said["files"]["custom_generate/generate.py"] == {
        "sha256": hashlib.sha256(GENERATE).hexdigest(), "bytes": len(GENERATE),
    }  # fmt: skip
    assert said["requires"][1]["status"] == "not needed here"
    assert said["installed"] is False
    assert said["digest"] in result.err


def test_the_same_commit_gives_the_same_wheel_from_the_hub_and_from_the_quarantine(
    run: Run, hub: Any, tmp_path: Path
) -> None:
    run(SOURCE, "--yes")
    first = wheels(tmp_path)[0].read_bytes()
    hub.log.clear()
    assert run(SOURCE, "--yes").code == 0
    assert wheels(tmp_path)[0].read_bytes() == first
    assert hub.log == []


def test_a_commit_that_was_fetched_needs_no_hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(SOURCE, "--yes")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(SOURCE, "--yes").code == 0


def test_offline_a_commit_that_was_not_fetched_is_an_error_without_a_request(
    run: Run, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(SOURCE, "--yes")
    assert f"ModelNotFoundError: {SOURCE} was not fetched before." in result.err
    assert "Run the same command once with a connection" in result.err
    assert hub.log == []


def test_an_interrupted_download_is_resumed_and_a_redirect_followed(
    run: Run, hub: Any, repo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    long = GENERATE + b"# " + b"x" * 60_000
    repo.files["custom_generate/generate.py"] = long
    repo.cut["custom_generate/generate.py"] = 20_000
    repo.redirected = {"custom_generate/zq_helper.py"}
    assert run(SOURCE, "--yes", "--json").code == 0
    assert [wanted for method, _, wanted in hub.log if method == "GET" and wanted] == ["bytes=20000-"]
    assert any("/moved/" in path for _, path, _ in hub.log)
    content = {path.read_bytes() for path in (tmp_path / "cache" / "quarantine").rglob("*") if path.is_file()}
    assert {long, HELPER} < content


def test_another_commit_is_another_wheel(run: Run, tmp_path: Path) -> None:
    run(SOURCE, "--yes")
    run(f"hub:org/Zq_Echo@{OLDER}", "--yes")
    assert len(wheels(tmp_path)) == 2


# Where code is meant, only a commit will do


@pytest.mark.parametrize(
    ("revision", "named", "now"),
    [("@main", "main", COMMIT), ("@v1", "v1", OLDER), (f"@{OLDER[:7]}", OLDER[:7], OLDER), ("", "main", COMMIT)],
)
def test_a_branch_a_tag_and_a_short_hash_are_refused_with_the_commit(
    run: Run, hub: Any, revision: str, named: str, now: str
) -> None:
    result = run(f"hub:org/Zq_Echo{revision}", "--yes")
    assert result.code == 1
    assert f"{named} is now at {now}; if that is what you mean, write hub:org/Zq_Echo@{now}" in result.err
    assert "A commit of 40 hex digits never changes." in result.err
    assert hub.fetched() == []


@pytest.mark.parametrize("why", ["unknown", "offline", "down"])
def test_without_an_answer_of_the_hub_it_is_told_where_to_look(
    run: Run, hub: Any, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if why == "down":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    result = run("hub:org/Zq_Echo@gone" if why == "unknown" else "hub:org/Zq_Echo@main", "--yes")
    assert "/org/Zq_Echo/commits/main, copy the whole hash of a commit" in result.err


def test_a_branch_that_is_named_like_a_commit_is_found_out(run: Run, repo: Any) -> None:
    repo.claims = {COMMIT: OLDER}
    result = run(SOURCE, "--yes")
    assert f"InputError: the Hub answered for commit {OLDER}, not for {COMMIT}." in result.err


def test_a_file_of_another_commit_is_found_out(run: Run, repo: Any) -> None:
    repo.claims = {"custom_generate/generate.py": OLDER}
    result = run(SOURCE, "--yes")
    assert f"InputError: the Hub answered with custom_generate/generate.py of commit {OLDER}" in result.err


@pytest.mark.parametrize(
    ("source", "faults", "error", "text"),
    [
        (f"hub:org/other@{COMMIT}", {}, "ModelNotFoundError", 'There is no model "org/other" on the Hub'),
        (f"hub:org/Zq_Echo@{'f' * 40}", {}, "ModelNotFoundError", f"org/Zq_Echo has no commit {'f' * 40}."),
        (SOURCE, {"answers": {("GET", "info"): (403, {"X-Error-Code": "GatedRepo"})}}, "ModelError", "is gated"),
        (SOURCE, {"answers": {("GET", "info"): (500, {})}}, "ModelError", "status 500"),
        (SOURCE, {"wrong_size": {"custom_generate/generate.py": 5000}}, "ModelError", "size"),
    ],
)
def test_failures_of_the_hub_are_typed_and_leave_nothing(
    run: Run, repo: Any, tmp_path: Path, source: str, faults: dict[str, Any], error: str, text: str
) -> None:
    for name, value in faults.items():
        setattr(repo, name, value)
    result = run(source, "--yes", "--token", "hf_secretsecret")
    assert result.code == 1
    assert result.err.startswith(f"{error}: ")
    assert text in result.err
    assert "To do:" in result.err
    assert "hf_secret" not in result.err
    assert wheels(tmp_path) == []
    assert not list((tmp_path / "cache").rglob("table.json"))


# What is no recipe


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"custom_generate/generate.py": None}, NO_RECIPE.format("org/Zq_Echo")),
        ({"custom_generate/deep/helper.py": b""}, "'custom_generate/deep/helper.py' lies in a folder below"),
        ({"custom_generate/../../evil.py": b""}, "lies in a folder below"),
        ({"custom_generate/..\\evil.py": b""}, "is no module's name"),
        ({"custom_generate/my-helper.py": b""}, "is no module's name"),
        ({"custom_generate/a b.py": b""}, "is no module's name"),
        ({"custom_generate/Generate.py": b""}, "nothing but capitals"),
        ({f"custom_generate/m{i}.py": b"" for i in range(63)}, "66 files"),
        ({"custom_generate/large.py": b"#" * (2**19 + 1)}, "large.py has 524289 bytes; at most 64 files"),
        ({f"custom_generate/m{i}.py": b"#" * 2**19 for i in range(4)}, "at most 64 files"),
        ({"LICENSE": b"x" * (2**19 + 1)}, "LICENSE has 524289 bytes"),
        ({"custom_generate/generate.py": b"x = 1"}, "does not define `generate`"),
        ({"custom_generate/generate.py": b"# coding: utf-7\ndef generate(): ..."}, "declares the encoding utf-7"),
        ({"custom_generate/zq_helper.py": None}, "imports .zq_helper, which is not there"),
        ({"custom_generate/requirements.txt": b"\xff"}, "requirements.txt of `org/Zq_Echo` is not UTF-8"),
        ({"custom_generate/requirements.txt": b"x @ https://host.invalid/x.whl"}, "line 1 of custom_generate/req"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_and_nothing_is_built(
    run: Run, hub: Any, repo: Any, tmp_path: Path, files: dict[str, bytes | None], text: str
) -> None:
    for name, data in files.items():
        repo.files.pop(name, None)
        if data is not None:
            repo.files[name] = data
    result = run(SOURCE, "--yes")
    assert result.code == 1
    assert "InputError: " in result.err
    assert text in result.err
    assert "To do:" in result.err
    assert wheels(tmp_path) == []
    assert not any("evil" in name for name in hub.fetched())
    assert not list(tmp_path.rglob("*evil*"))


def test_a_file_larger_than_announced_is_cut_off(run: Run, repo: Any) -> None:
    repo.extra = []
    repo.files["custom_generate/generate.py"] = GENERATE + b"#" * 2**20
    from pluglm_vendor import fetch

    listing = dict.fromkeys(FILES, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_listing", lambda source, token: listing)
        result = run(SOURCE, "--yes")
    assert "custom_generate/generate.py is larger than 524288 bytes." in result.err


@pytest.mark.parametrize("what", ["file", "folder", "fifo", "directory"])
def test_a_folder_with_links_and_special_files_is_refused(run: Run, tmp_path: Path, what: str) -> None:
    place = folder_of(tmp_path / "mine", PLAIN)
    secret = tmp_path / "secret.py"
    secret.write_text("def generate(): ...")
    if what == "file":
        (place / "custom_generate" / "helper.py").symlink_to(secret)
    elif what == "folder":
        (place / "custom_generate").rename(tmp_path / "real")
        (place / "custom_generate").symlink_to(tmp_path / "real")
    elif what == "fifo":
        os.mkfifo(place / "custom_generate" / "helper.py")
    else:
        (place / "custom_generate" / "deep").mkdir()
    result = run(place, "--yes")
    assert result.code == 1
    assert {"fifo": "is no ordinary file", "directory": "lies in a folder below"}.get(
        what, "is a symbolic link"
    ) in result.err


def test_a_folder_without_a_recipe_is_refused_in_the_words_of_the_reference(run: Run, tmp_path: Path) -> None:
    assert NO_RECIPE.format(tmp_path) in run(tmp_path, "--yes").err
    place = folder_of(tmp_path / "mine", PLAIN)
    assert "name the folder that contains custom_generate" in run(place / "custom_generate", "--yes").err


# Nothing importable before consent

_WATCHED = """
import sys
events = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append(["write", str(arguments[0])])
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        events.append(["write", str(arguments[1] if event != "os.mkdir" else arguments[0])])
    elif event == "import":
        events.append(["import", arguments[0]])
    elif event == "exec" and "custom_generate" in str(getattr(arguments[0], "co_filename", "")):
        events.append(["exec", arguments[0].co_filename])
    elif event == "pluglm.vendor":
        events.append(["vendor", *map(str, arguments)])
sys.addaudithook(hook)
import io, json
from pluglm.cli.main import main
sys.stdin = io.StringIO()
try:
    main(sys.argv[1:])
finally:
    print(json.dumps([events, sys.path]))
"""


def test_before_consent_nothing_importable_exists_and_nothing_is_run(hub: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", _WATCHED, "vendor", SOURCE, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "nobody was there to agree" in done.stderr
    events, paths = json.loads(done.stdout.splitlines()[-1])
    written = [Path(event[1]) for event in events if event[0] == "write" and event[1] != os.devnull]
    quarantine = tmp_path / "cache" / "quarantine"
    kept = [path for path in written if path.is_relative_to(quarantine)]
    assert kept
    assert all(path.is_relative_to(tmp_path / "cache" / "discovery") for path in written if path not in kept
               if path not in (tmp_path / "cache", quarantine))  # fmt: skip
    assert not any(path.suffix == ".py" for path in kept)
    assert not [event for event in events if event[0] == "exec"]
    assert not [event[1] for event in events if event[0] == "import" and "zq_" in event[1]]
    for place in filter(os.path.isdir, paths):
        assert not [name for name in os.listdir(place) if "zq_" in name.lower()]
    digests = {hashlib.sha256(FILES[name]).hexdigest() for name in TAKEN}
    assert {path.name for path in quarantine.rglob("*") if path.is_file()} == digests | {"table.json"}
    steps = [(event[1], event[2]) for event in events if event[0] == "vendor"]
    assert steps == [("fetched", SOURCE), ("refused", SOURCE)]


def test_every_step_is_an_audit_event(run: Run, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    listening = [True]
    sys.addaudithook(lambda event, said: told.append(said) if listening[0] and event == "pluglm.vendor" else None)
    run(SOURCE, "--name", "zq-asked", answer="n")
    run(SOURCE, "--name", "zq-asked", answer="y")
    run(SOURCE, "--name", "zq-asked", "--yes")
    listening[0] = False  # a hook cannot be removed
    assert [(step, detail) for step, _, _, detail in told if step != "built"] == [
        ("fetched", ""), ("refused", "answered no"), ("fetched", ""), ("consented", "answered yes"), ("fetched", ""),
        ("consented", "--yes"),
    ]  # fmt: skip
    assert [detail for step, _, _, detail in told if step == "built"] == [str(wheels(tmp_path)[0])] * 2
    assert {source for _, source, _, _ in told} == {SOURCE}


# Requirements


def test_unmet_requirements_forbid_the_installation_and_warn_of_the_wheel(run: Run, repo: Any, tmp_path: Path) -> None:
    repo.files["custom_generate/requirements.txt"] = b"foo\nbar==0.0.0\ntorch>=99.0\n"
    refused = run(SOURCE, "--yes", "--install")
    text = "Missing requirements in your local environment for `org/Zq_Echo`:\nfoo (installed: None)\nbar==0.0.0"
    assert refused.err.startswith(f"MissingRequirementsError: {text}")
    assert "--with-deps" in refused.err
    assert wheels(tmp_path) == []
    built = run(SOURCE, "--yes")
    assert built.code == 0
    assert text in built.err
    assert len(wheels(tmp_path)) == 1


def test_the_text_for_unmet_requirements_is_that_of_the_reference(tmp_path: Path) -> None:
    from pluglm_vendor.needs import check, missing, read_requirements
    from transformers.dynamic_module_utils import check_python_requirements

    text = "foo\nbar==0.0.0\ntorch>=99.0\ntorch>2.0\n"
    (tmp_path / "requirements.txt").write_text(text)
    with pytest.raises(ImportError) as theirs:
        check_python_requirements(str(tmp_path))
    ours = missing(str(tmp_path), check(read_requirements(str(tmp_path), text)))
    assert ours is not None
    assert ours.what == str(theirs.value)


def test_options_that_make_no_sense_together_are_a_mistake(run: Run) -> None:
    result = run(SOURCE, "--with-deps")
    assert result.code == 2
    assert "--with-deps goes with --install" in result.err


# Installed: a plugin like any other


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which `pluglm vendor --install` put a recipe of the Hub, and one of a folder."""
    from pluglm_vendor.recipe import read_folder
    from pluglm_vendor.sources import FolderSource
    from pluglm_vendor.wheel import write_wheel

    place = tmp_path_factory.mktemp("vendored")
    with hub_server.HubServer({"org/Zq_Echo": hub_server.Repo(dict(FILES))}) as server:
        done = _pluglm(
            ["vendor", SOURCE, "--yes", "--install", "--out", str(place / "out")], place,
            HF_ENDPOINT=server.endpoint, PIP_TARGET=str(place / "site"), HF_HUB_OFFLINE="0",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Installed. Use it: lm.generate(" in done.stdout
    recipe = read_folder(FolderSource(folder_of(place / "Zq_Plain", PLAIN)))
    with ZipFile(write_wheel(recipe, "zq-plain", [], place / "out")) as wheel:
        wheel.extractall(place / "site")
    return place / "site"


def _pluglm(arguments: Sequence[str], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as on a machine without a Hub unless told otherwise."""
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-m", "pluglm.cli", *arguments], capture_output=True, text=True, check=False, timeout=120,
        env={**inherited, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1",
             "PLUGLM_CACHE_DIR": str(place / "cache"), "PLUGLM_CONFIG_DIR": str(place / "config"), **environment},
    )  # fmt: skip


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On the import path of this process; modules of recipes are forgotten afterwards."""
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PLUGLM_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.syspath_prepend(str(site))
    yield site
    for name in [name for name in sys.modules if "pluglm_recipe_" in name]:  # the package, and the recipe's modules
        del sys.modules[name]


def test_the_commands_about_plugins_know_it(site: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(site)}
    listed = json.loads(_pluglm(["plugins", "list", "--kind", "decoding", "--json"], tmp_path, **path).stdout)
    (row,) = (row for row in listed["plugins"] if row["id"] == "pluglm-recipe-zq-echo:decoding/zq-echo")
    assert (row["version"], row["state"]) == ("1.0+g0123456789ab", "enabled")
    info = _pluglm(["plugins", "info", "zq-echo"], tmp_path, **path)
    assert "vendored from org/Zq_Echo" in info.stdout
    assert "Disabled" in _pluglm(["plugins", "disable", "zq-echo"], tmp_path, **path).stdout
    assert '"disabled"' in _pluglm(["plugins", "list", "--kind", "decoding", "--json"], tmp_path, **path).stdout


def test_it_generates_by_name_by_id_and_by_the_folder_it_came_from_without_a_hub(
    installed: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    lm = pluglm.load(folder)
    clone = folder_of(tmp_path / "clone", {name: FILES[name] for name in TAKEN})
    asked = {"favourite": 9, "max_new_tokens": 4}
    for said in (
        {"decoding": "zq-echo"}, {"decoding": "pluglm-recipe-zq-echo:decoding/zq-echo"},
        {"custom_generate": "zq-echo"}, {"custom_generate": str(clone)}, {"custom_generate": clone},
    ):  # fmt: skip
        done = lm.complete([5, 6, 8], **said, **asked)
        assert not isinstance(done, list)
        assert done.token_ids == (9, 9, 9, 9)
    plan = pluglm.load(folder, decoding="zq-echo").plan["decoding"]
    assert (plan.provider, plan.version) == ("pluglm-recipe-zq-echo:decoding/zq-echo", "1.0+g0123456789ab")


def test_one_that_is_switched_off_is_not_used_and_not_imported(installed: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["plugins", "disable", "zq-echo"])
    clone = folder_of(tmp_path / "clone", {name: FILES[name] for name in TAKEN})
    lm = pluglm.load(folder)
    for said in ({"decoding": "zq-echo"}, {"custom_generate": str(clone)}):
        with pytest.raises(PluginDisabledError, match="switched off"):
            lm.generate([5, 6, 8], **said, max_new_tokens=2)
    assert not [name for name in sys.modules if name.startswith("pluglm_recipe_")]


def test_a_changed_byte_stops_a_call_and_nothing_else(installed: Path, folder: Path, tmp_path: Path) -> None:
    site = Path(copytree(installed, tmp_path / "site"))
    file = site / "pluglm_recipe_zq_echo" / "recipe" / "custom_generate" / "zq_helper.py"
    file.write_bytes(HELPER.replace(b"new", b"nev"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(site), *(path for path in sys.path if path != str(installed))])
        lm = pluglm.load(folder)
        with pytest.raises(
            PluginError, match=r"recipe/custom_generate/zq_helper.py of pluglm-recipe-zq-echo is not as it"
        ):
            lm.generate([5, 6, 8], decoding="zq-echo", max_new_tokens=2)
        assert len(lm.complete([5, 6, 8], max_new_tokens=3).token_ids) == 3  # type: ignore[union-attr]


def test_a_name_that_is_taken_is_refused_and_a_successor_is_not(
    run: Run, installed: Path, repo: Any, tmp_path: Path
) -> None:
    successor = run(f"hub:org/Zq_Echo@{OLDER}", "--yes")
    assert successor.code == 0
    assert "replaces  pluglm-recipe-zq-echo 1.0+g0123456789ab" in successor.out
    stranger = run(folder_of(tmp_path / "Zq_Echo", PLAIN), "--yes")
    assert stranger.code == 1
    assert (
        "PluginConflictError: decoding 'zq-echo' is provided already, by pluglm-recipe-zq-echo:decoding/zq-echo "
        "1.0+g0123456789ab, vendored from org/Zq_Echo."
    ) in stranger.err
    assert "Choose another with --name" in stranger.err
    first_party = run(SOURCE, "--yes", "--name", "greedy")
    assert "decoding 'greedy' is provided already, by pluglm-decoding-standard:decoding/greedy" in first_party.err


def test_pip_failing_is_told_with_its_last_words(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho ERROR: the disk is full >&2\nexit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    result = run(SOURCE, "--yes", "--install")
    assert result.code == 1
    assert "ERROR: the disk is full" in result.err
    assert "PluginError: pluglm_recipe_zq_echo-1.0+g0123456789ab-py3-none-any.whl was not installed." in result.err
    assert "install it by hand once that is put right" in result.err


# The seal


def test_the_seal_of_an_installed_recipe_holds(installed: Path) -> None:
    from pluglm_hf.recipes.sealed import read_sealed

    sealed = read_sealed("pluglm_recipe_zq_echo")
    assert (sealed.source, sealed.repo, sealed.commit) == (SOURCE, "org/Zq_Echo", COMMIT)
    assert sealed.files["custom_generate/generate.py"] == GENERATE
    assert set(sealed.files) == {name for name in TAKEN if name.startswith("custom_generate/")}
    assert read_sealed("pluglm_recipe_zq_plain").commit is None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("recipe/custom_generate/generate.py", "its sha256 is"),
        ("recipe/custom_generate/zq_helper.py", "its sha256 is"),
        ("recipe/custom_generate/requirements.txt", "its sha256 is"),
        ("-recipe/custom_generate/zq_helper.py", "it cannot be read"),
        ("+recipe/custom_generate/other.py", "it is not in the list of the files that were vendored"),
        ("+recipe/deep/other.py", "it is not in the list of the files that were vendored"),
        ("digest", "it says the digest"),
        ("files", "its sha256 is"),
        ("both", "it says the digest"),
        ("schema", "it has the schema 2"),
        ("traversal", "it is not of the form"),
        ("no entry", "it is not of the form"),
        ("json", "it cannot be read"),
        ("list", "it cannot be read"),
        ("missing", "it cannot be read (KeyError"),
    ],
)
def test_a_change_to_an_installed_recipe_is_refused_by_name(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str
) -> None:
    from pluglm_hf.recipes.sealed import read_sealed

    copytree(installed / "pluglm_recipe_zq_echo", tmp_path / "pluglm_recipe_zq_broken")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "pluglm_recipe_zq_broken" / path.lstrip("+-")
    record = tmp_path / "pluglm_recipe_zq_broken" / "recipe.json"
    said = json.loads(record.read_text())
    named = file.relative_to(tmp_path / "pluglm_recipe_zq_broken").as_posix()
    if path.startswith("-"):
        file.unlink()
    elif path.startswith("+"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    elif path.startswith("recipe/"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        named = "recipe.json"
        entry = said["files"]["custom_generate/generate.py"]
        other = entry[:-1] + ("0" if entry[-1] != "0" else "1")
        if path == "digest":
            said["digest"] = said["digest"][::-1]
        elif path == "files":
            said["files"]["custom_generate/generate.py"] = other
            named = "recipe/custom_generate/generate.py"
        elif path == "both":  # a changed file whose digest was corrected, and the seal was not
            generate = record.parent / "recipe" / "custom_generate" / "generate.py"
            generate.write_bytes(b"def generate(model): ...")
            said["files"]["custom_generate/generate.py"] = hashlib.sha256(generate.read_bytes()).hexdigest()
        elif path == "schema":
            said["schema"] = 2
        elif path == "traversal":
            said["files"]["../../secret.py"] = entry
        elif path == "no entry":
            del said["files"]["custom_generate/generate.py"]
        elif path == "missing":
            del said["digest"]
        record.write_text("{" if path == "json" else "[]" if path == "list" else json.dumps(said))
    with pytest.raises(PluginError, match="is not as it was vendored; nothing of the recipe was run") as caught:
        read_sealed("pluglm_recipe_zq_broken")
    assert caught.value.path == named
    assert named in caught.value.what
    assert text in caught.value.why
    assert "vendor it again" in caught.value.fix


def test_no_flipped_byte_of_a_sealed_file_gets_through(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pluglm_hf.recipes.sealed import read_sealed

    copytree(installed / "pluglm_recipe_zq_echo", tmp_path / "pluglm_recipe_zq_flipped")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused = flipped = 0
    for name in ("generate.py", "zq_helper.py"):
        file = tmp_path / "pluglm_recipe_zq_flipped" / "recipe" / "custom_generate" / name
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
            flipped += 1
            with contextlib.suppress(PluginError):
                read_sealed("pluglm_recipe_zq_flipped")
                continue
            refused += 1
        file.write_bytes(whole)
    assert refused == flipped == len(GENERATE + HELPER)
    assert read_sealed("pluglm_recipe_zq_flipped").commit == COMMIT


# A folder that was vendored


def test_a_folder_leads_to_the_plugin_that_was_made_from_it(installed: Path, tmp_path: Path) -> None:
    assert vendored_name(folder_of(tmp_path / "anywhere", PLAIN)) == "pluglm-recipe-zq-plain:decoding/zq-plain"
    hub_copy = folder_of(tmp_path / "clone", {k: v for k, v in FILES.items() if k not in ("other/generate.py",)})
    assert vendored_name(hub_copy) == "pluglm-recipe-zq-echo:decoding/zq-echo"
    assert not [name for name in sys.modules if name.startswith("pluglm_recipe_")]


def test_a_folder_that_was_not_vendored_or_has_changed_is_refused(installed: Path, tmp_path: Path) -> None:
    place = folder_of(tmp_path / "Zq_Plain", {"custom_generate/generate.py": b"def generate(model): 1"})
    with pytest.raises(PluginNotFoundError, match="is not vendored") as caught:
        vendored_name(place)
    assert "code is run from plugins only" in caught.value.why
    assert "pluglm-recipe-zq-plain:decoding/zq-plain was made from a folder of this name" in caught.value.why
    assert f"`pluglm vendor {place} --install`" in caught.value.fix
    with pytest.raises(InputError, match="can't load the custom generate function"):
        vendored_name(tmp_path)


def test_a_folder_that_was_vendored_twice_is_ambiguous(installed: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    copytree(installed / "pluglm_recipe_zq_plain", second / "pluglm_recipe_zq_again")
    info = second / "pluglm_recipe_zq_again-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: pluglm-recipe-zq-again\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pluglm.decoding]\nzq-again = pluglm_recipe_zq_again\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(second))
        with pytest.raises(PluginConflictError, match="was vendored more than once") as caught:
            vendored_name(folder_of(tmp_path / "anywhere", PLAIN))
    assert len(caught.value.candidates) == 2


def test_what_is_read_of_a_folder_is_what_was_sealed(installed: Path, tmp_path: Path) -> None:
    from pluglm_hf.recipes.sealed import read_sealed

    assert read_recipe(folder_of(tmp_path / "x", FILES)) == dict(read_sealed("pluglm_recipe_zq_echo").files)
