"""Sub-commands that plugins add: listed without import, run through the manager, refused when broken."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from pluglm import QuarantinedError, hookimpl
from pluglm.cli import root
from pluglm.cli.main import cli
from pluglm.provider import Provider
from pluglm.registry import Registry
from pluglm.testing.isolation import fake_provider


class Serving:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def pluglm_build_command(self) -> Any:
        return self.answer


@click.command("serve")
def serve() -> None:
    """Serve."""
    click.echo("served")


def install(monkeypatch: pytest.MonkeyPatch, *providers: Provider) -> None:
    monkeypatch.setattr(root.RootGroup, "_providers", lambda self: {p.name: p for p in providers})
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: cls(providers)))


def test_a_plugins_command_is_listed_from_its_manifest_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_provider("command", "serve", Serving(serve), facts={"summary": "answers over HTTP"}))
    listed = CliRunner().invoke(cli, ["--help"]).output
    assert "answers over HTTP (acme-test)" in listed
    assert CliRunner().invoke(cli, ["serve"]).output == "served\n"


def test_a_command_that_is_no_command_is_quarantined(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_provider("command", "serve", Serving("not a command")))
    result = CliRunner().invoke(cli, ["serve"])
    assert isinstance(result.exception, QuarantinedError)
    assert "pluglm_build_command returned str" in str(result.exception)


def test_a_plugin_cannot_take_a_command_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_provider("command", "plugins", Serving(serve)))
    assert "served" not in CliRunner().invoke(cli, ["plugins", "--help"]).output


def test_a_plugins_command_with_a_typo_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_provider("command", "serve", Serving(serve)))
    assert "Did you mean 'serve'?" in CliRunner().invoke(cli, ["srve"]).output
