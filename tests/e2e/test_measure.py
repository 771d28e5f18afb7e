"""`pluglm measure`: every candidate of `auto` is timed and checked, and `auto` follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pluglm
from pluglm.cli.main import cli
from pluglm.errors import InputError, SaveError
from pluglm.measure import measure
from pluglm.provider import Provider
from pluglm.registry import Registry
from pluglm.scores import Scores, load_scores
from pluglm.testing.isolation import fake_provider

PARTS = tuple(fake_provider("attention", name, object()) for name in "abc")


def test_the_command_measures_every_candidate_and_auto_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUGLM_CONFIG_DIR", str(tmp_path))
    few = ["--prompt-tokens", "3", "--tokens", "2", "--rounds", "1"]
    said = CliRunner().invoke(cli, ["measure", "cache", "-m", "pystdlib", "--attention", "sdpa", *few])
    assert said.exit_code == 0, said.output
    kept = {s.provider: s.token_ms for s in load_scores().entries}
    assert {"pluglm-caches:cache/dynamic", "pluglm-caches:cache/static"} <= set(kept)
    assert all(f"{name}: " in said.output for name in kept)
    tiers = {p.id: (p.facts or {}).get("tier", "portable") for p in Registry.installed().of("cache")}
    fastest = min((name for name in kept if tiers[name] == "portable"), key=lambda name: kept[name])
    shown = CliRunner().invoke(cli, ["explain", "pystdlib"]).output
    assert f"cache=auto -> {fastest}" in shown
    assert "ms a token measured here" in shown
    assert CliRunner().invoke(cli, ["measure", "--forget"]).output == "The scores are deleted.\n"
    assert CliRunner().invoke(cli, ["measure", "cache", "-m", "pystdlib", *few, "--dry-run"]).exit_code == 0
    assert load_scores() == Scores()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "name a KIND"), (["attention", "--attention", "sdpa"], "leave it out"), (["quantizer"], "'quantizer' is not one of")],
)  # fmt: skip
def test_mistakes_in_the_arguments_are_told(arguments: list[str], says: str) -> None:
    said = CliRunner().invoke(cli, ["measure", *arguments])
    assert said.exit_code == 2
    assert says in said.output


def test_candidates_that_compute_something_else_or_fail_are_left_out_with_the_reason() -> None:
    right = pluglm.load("pystdlib", dtype="float32")
    wrong = pluglm.load("pystdlib", dtype="float32")
    wrong.model.get_output_embeddings()  # exists: below, the embedding that the tied head reads is changed
    for parameter in wrong.model.get_input_embeddings().parameters():
        parameter.data.mul_(1.5)
    models = {"a": right, "b": wrong}

    def load(provider: Provider) -> Any:
        if provider.name == "c":
            raise SaveError("it broke.")
        return models[provider.name]

    done = measure(PARTS, load, prompt=4, tokens=2, rounds=2)
    assert [c.provider.name for c in done] == ["a", "b", "c"]
    assert len(done[0].rounds_ms) == 2
    assert done[0].token_ms > 0
    assert "differ from those of acme-test:attention/a" in done[1].problem
    assert done[2].problem == "SaveError: it broke."
    assert not done[1].rounds_ms


def test_a_context_too_short_is_an_error_of_the_call() -> None:
    model = pluglm.load("pystdlib", dtype="float32")
    with pytest.raises(InputError, match="context"):
        measure(PARTS[:1], lambda _: model, prompt=10_000, tokens=5_000)
