"""What is wrong with one plugin ends at that plugin: named, it gives a typed error; unnamed, the others do the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import border_kit
import breaks
import pytest

from pluglm import QuarantinedError, hookimpl, kinds
from pluglm.testing.isolation import fake_provider, isolated_manager

KINDS = ("attention", "cache", "decoding")
ROWS = [(kind, name) for kind in KINDS for name in breaks.breaks_of(kind)]
#: Kinds that `auto` does not choose, spot-checked by name.
SPOTS = [
    ("quantizer", name) for name in ("import-error", "misspelt-hook", "raises-in-build", "returns-dict", "other-api")
]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(kind, break) -> a folder with that plugin installed from its wheel, and nothing else."""
    place = tmp_path_factory.mktemp("broken")
    wheels = border_kit.build([breaks.make(*row, place) for row in [*ROWS, *SPOTS]])
    return {
        row: border_kit.unpack(wheel, place / "sites" / "-".join(row))
        for row, wheel in zip([*ROWS, *SPOTS], wheels, strict=True)
    }


@pytest.fixture(scope="module")
def told(sites: dict[tuple[str, str], Path], site: Path, llama: Path) -> dict[str, Any]:
    """Every scene with a model, in one process."""
    plain = {"model": str(llama), "ids": border_kit.PROMPT}
    scenes = {"alone": border_kit.scene("load", [], **plain)}
    for row in [*ROWS, *SPOTS]:
        kind, name = row
        scenes[f"{kind} {name} named"] = border_kit.scene(
            "load", [sites[row]], **plain, **{kind: breaks.provider_id(kind, name)}
        )
        if kind in KINDS:
            scenes[f"{kind} {name} auto"] = border_kit.scene("load", [sites[row]], **plain)
    everything = [*(sites[row] for row in ROWS), site]
    scenes["all broken, auto"] = border_kit.scene("load", everything, **plain)
    scenes["all broken, strangers named"] = border_kit.scene(
        "load", everything, **plain, attention="acme-attention:attention/groups", cache="acme-cache:cache/chunks",
        decoding="banned", quantizer="rows8", executor="counting",
    )  # fmt: skip
    return border_kit.play(scenes)


def filled(text: str, kind: str, name: str) -> str:
    victim = breaks.VICTIMS[kind]
    package = f"{victim.distribution}-{name}".replace("-", "_")
    known = {"hook": victim.hook, "package": package, "kind": kind, "api": kinds.KINDS[kind].version}
    for word, value in known.items():
        text = text.replace("{" + word + "}", value)
    return text


@pytest.mark.parametrize(("kind", "name"), [*ROWS, *SPOTS])
def test_a_broken_plugin_that_is_named_gives_a_typed_error_that_says_what_to_do(
    told: dict[str, Any], kind: str, name: str
) -> None:
    expected, result = breaks.breaks_of(kind)[name], told[f"{kind} {name} named"]
    assert result.get("error") == expected.error, result.get("traceback") or result["plan"]
    message = result["message"]
    for word in expected.words:
        assert filled(word, kind, name) in message
    if expected.error in ("UnsupportedRequestError", "CacheError"):  # the plugin's own words
        assert result["data"].get("reasons") in (None, ["too wide", "too deep"])
        return
    assert f"acme-{kind}-{name}" in message
    assert "2.1" in message
    assert "To do: " in message
    assert result["data"]["plugin"] == breaks.provider_id(kind, name)
    if expected.stage is not None:
        assert result["data"]["stage"] == expected.stage
        assert result["cause"] is not None
        assert "Everything else works" in message


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_with_auto_the_others_do_the_work_and_the_plan_says_why(told: dict[str, Any], kind: str, name: str) -> None:
    result, alone = told[f"{kind} {name} auto"], told["alone"]
    assert "error" not in result, result["traceback"]
    assert result["tokens"] == alone["tokens"]
    assert result["parts"] == alone["parts"]
    reason = filled(breaks.breaks_of(kind)[name].auto, kind, name)
    reasons = result["rejected"][breaks.provider_id(kind, name)]
    assert any(reason in given for given in reasons), reasons
    assert f"not {breaks.provider_id(kind, name)} 2.1: " in result["plan"]


def test_with_all_of_them_broken_at_once_the_rest_works(told: dict[str, Any]) -> None:
    auto, named = told["all broken, auto"], told["all broken, strangers named"]
    assert auto["tokens"] == told["alone"]["tokens"]
    for kind, name in ROWS:
        assert breaks.provider_id(kind, name) in auto["rejected"]
    assert named["calls"]["acme_attention"]["attend"] > 0
    assert named["calls"]["acme_cache"]["append"] > 0
    assert named["calls"]["acme_decoding"]["chosen"] == len(named["tokens"])
    assert named["calls"]["acme_quantizer"]["forward"] > 0
    assert named["calls"]["acme_extras"]["run"] > 0


def test_plugins_commands_work_beside_every_broken_one_and_import_none(
    sites: dict[tuple[str, str], Path], site: Path
) -> None:
    scenes = {
        "all list": border_kit.scene("cli", [*sites.values(), site], arguments=["plugins", "list", "--json"]),
        "all doctor": border_kit.scene("cli", [*sites.values(), site], arguments=["plugins", "doctor"]),
        "all why": border_kit.scene("cli", [*sites.values(), site], arguments=["plugins", "why", "attention"]),
    }
    for name in breaks.breaks_of("attention"):
        scenes[name] = border_kit.scene("cli", [sites["attention", name]], arguments=["plugins", "doctor", "--json"])
    results = border_kit.play(scenes)
    for name, result in results.items():
        assert (name, result["imported"], result["torch"]) == (name, [], False)
    rows = {row["id"]: row for row in json.loads(results["all list"]["out"])["plugins"]}
    assert results["all list"]["code"] == results["all why"]["code"] == 0
    assert results["all doctor"]["code"] == 1
    for kind, name in sites:
        assert breaks.provider_id(kind, name) in rows
    assert rows["acme-attention-other-api:attention/groups"]["state"] == "incompatible API"
    for name, expected in breaks.breaks_of("attention").items():
        assert (name, results[name]["code"]) == (name, expected.doctor), results[name]["out"]
        errors = [f for f in json.loads(results[name]["out"]) if f["severity"] == "error"]
        assert not expected.doctor or "acme_attention" in str(errors) or "acme-attention" in str(errors)


class HalfBroken:
    """Its build hook does not fit, its other hook does."""

    heard: list[str] = []  # noqa: RUF012 - one for the test

    @hookimpl
    def pluglm_audit(self, event: str) -> None:
        self.heard.append(event)

    @hookimpl
    def pluglm_build_cache(self, question: Any) -> Any: ...


def test_no_hook_of_a_plugin_that_was_refused_is_called() -> None:
    provider = fake_provider("cache", "half", HalfBroken(), facts={})
    manager = isolated_manager(provider)
    with pytest.raises(QuarantinedError, match="question"):
        manager.call(provider, "pluglm_build_cache", request=None)
    manager.audit("later")
    assert HalfBroken.heard == []


@pytest.fixture(scope="module")
def clashing(site: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two distributions with one name; one distribution twice; an architecture that a stranger claims as well."""
    place = tmp_path_factory.mktemp("clash")
    rivals = border_kit.sources("acme-attention", place / "rival")
    text = (rivals / "pyproject.toml").read_text().replace('name = "acme-attention"', 'name = "acme-rival"')
    (rivals / "pyproject.toml").write_text(text)
    newer = border_kit.sources("acme-attention", place / "newer")
    text = (newer / "pyproject.toml").read_text().replace('version = "2.1"', 'version = "2.2"')
    (newer / "pyproject.toml").write_text(text)
    llamas = border_kit.sources("acme-architecture", place / "llamas")
    text = (llamas / "pyproject.toml").read_text().replace("acme-tiny", "llama")
    (llamas / "pyproject.toml").write_text(text)
    names = ("rival", "newer", "llamas")
    wheels = border_kit.build([rivals, newer, llamas])
    folders = {name: border_kit.unpack(w, place / "sites" / name) for name, w in zip(names, wheels, strict=True)}
    again = Path(shutil.copytree(site, place / "sites" / "again"))
    plain = {"model": str(llama), "ids": border_kit.PROMPT}
    first = "acme-attention:attention/groups"
    return border_kit.play(
        {
            "named": border_kit.scene("load", [site, folders["rival"]], **plain, attention="groups"),
            "by id": border_kit.scene("load", [site, folders["rival"]], **plain, attention=first),
            "auto": border_kit.scene("load", [site, folders["rival"]], **plain),
            "doctor": border_kit.scene("cli", [site, folders["rival"]], arguments=["plugins", "doctor"]),
            "twice": border_kit.scene("load", [site, folders["newer"]], **plain, attention="groups"),
            "twice, id": border_kit.scene("load", [site, folders["newer"]], **plain, attention=first),
            "twice, auto": border_kit.scene("load", [site, folders["newer"]], **plain),
            "twice, doctor": border_kit.scene("cli", [site, folders["newer"]], arguments=["plugins", "doctor"]),
            "two copies": border_kit.scene("load", [site, again], **plain, attention="groups"),
            "llama": border_kit.scene("load", [folders["llamas"]], **plain),
            "llama by id": border_kit.scene(
                "load", [folders["llamas"]], **plain, architecture="pluglm-arch-llama:architecture/llama"
            ),
            "unknown": border_kit.scene("load", [site], **plain, attention="gruops"),
        },
        ACME_ZOO=str(llama),
    )


def test_a_name_that_two_distributions_claim_names_both_and_a_full_id_settles_it(clashing: dict[str, Any]) -> None:
    result = clashing["named"]
    assert result["error"] == "PluginConflictError"
    ids = ["acme-attention:attention/groups", "acme-rival:attention/groups"]
    assert result["data"]["candidates"] == ids
    assert all(name in result["message"] for name in ids)
    assert f"Name one in full, as {ids[0]!r}" in result["message"]
    assert clashing["by id"]["parts"]["attention"] == ids[0]
    assert set(ids) <= clashing["auto"]["rejected"].keys()
    assert clashing["doctor"]["code"] == 0
    assert "claimed by acme-attention:attention/groups and acme-rival:attention/groups" in clashing["doctor"]["out"]


def test_a_distribution_that_is_installed_in_two_versions_is_not_used_and_all_say_so(clashing: dict[str, Any]) -> None:
    for name in ("twice", "twice, id"):
        result = clashing[name]
        assert result["error"] == "PluginNotFoundError"
        assert "acme-attention: installed more than once (2.1 in " in result["message"]
        assert "Uninstall all but one" in result["message"]
    auto = clashing["twice, auto"]
    assert any(note.startswith("discovery stepped over acme-attention: installed more than") for note in auto["notes"])
    assert clashing["twice, doctor"]["code"] == 1
    assert "installed more than once" in clashing["twice, doctor"]["out"]


def test_two_copies_of_one_version_are_refused_as_well(clashing: dict[str, Any]) -> None:
    assert clashing["two copies"]["error"] == "PluginNotFoundError"
    assert "installed more than once (2.1 in " in clashing["two copies"]["message"]


def test_a_model_type_that_two_distributions_read_is_never_guessed(clashing: dict[str, Any]) -> None:
    result = clashing["llama"]
    assert result["error"] == "PluginConflictError"
    assert result["data"]["candidates"] == [
        "acme-architecture:architecture/llama",
        "pluglm-arch-llama:architecture/llama",
    ]
    assert clashing["llama by id"]["parts"]["architecture"] == "pluglm-arch-llama:architecture/llama"


def test_a_misspelt_name_is_told_the_right_one(clashing: dict[str, Any]) -> None:
    assert clashing["unknown"]["error"] == "PluginNotFoundError"
    assert "Did you mean 'groups'?" in clashing["unknown"]["message"]
