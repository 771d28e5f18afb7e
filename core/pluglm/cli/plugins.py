"""`pluglm plugins`: looks at plugins, checks them, switches them on and off. Imports none of them, and no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from pluglm.discovery import discover
from pluglm.errors import PluginError
from pluglm.kinds import KINDS
from pluglm.provider import Provider
from pluglm.static_filter import satisfies

if TYPE_CHECKING:
    from pluglm.state import State

_kind = click.Choice(list(KINDS))


@click.group()
def command() -> None:
    """List, check and switch plugins; imports none of them."""


def _state() -> State | None:
    """What is disabled; None, with a word about it, if that cannot be read. Looking must always work."""
    from pluglm.state import load_state

    try:
        return load_state()
    except PluginError as error:
        click.echo(click.style(str(error), fg="red"), err=True)
        return None


def _status(provider: Provider, state: State | None) -> str:
    if state is None:
        return "unknown"
    if state.is_disabled(provider):
        return "disabled"
    if provider.facts is None:
        return "no facts"
    api = provider.facts.get("api")
    if not isinstance(api, str):
        return "problem"
    return "enabled" if satisfies(KINDS[provider.kind].version, api) else "incompatible API"


def _text(facts: Mapping[str, Any] | None, key: str, default: str = "") -> str:
    """A field for display, on one line and without control characters."""
    value = (facts or {}).get(key, default)
    if not isinstance(value, str):
        return "?"
    return value if value.isprintable() else "".join(c if c.isprintable() else " " for c in value)


def _row(provider: Provider, state: State | None) -> dict[str, str]:
    return {
        "id": provider.id,
        "version": provider.version,
        "kind": provider.kind,
        "tier": _text(provider.facts, "tier", "portable") if provider.facts is not None else "",
        "state": _status(provider, state),
        "summary": _text(provider.facts, "summary"),
    }


def _echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


@command.command("list")
@click.option("--kind", type=_kind, help="Only this kind.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(kind: str | None, as_json: bool) -> None:
    """List what is installed and whether it is usable.

    States: enabled; disabled (by you); no facts (works when named, never chosen by itself); incompatible API; problem.
    """
    found = discover()
    state = _state()
    rows = [_row(provider, state) for provider in found.providers if kind in (None, provider.kind)]
    if as_json:
        problems = [{"stage": p.stage, "subject": p.subject, "message": p.message} for p in found.problems]
        _echo_json({"plugins": rows, "problems": problems})
        return
    if rows:
        from pluglm.cli.render import print_table

        print_table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        click.echo("No plugins are installed" + (f" of kind {kind}." if kind else "."))
    problems_noted = [problem for problem in found.problems if problem.stage != "path"]
    for problem in problems_noted:
        click.echo(f"problem: {problem.subject}: {problem.message}", err=True)


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, as_json: bool) -> None:
    """Show all that is known of a plugin, or of each plugin with that name. NAME may be an id."""
    from pluglm.state import find, not_found

    found = discover()
    matching = find(name, found.providers)
    if not matching:
        raise not_found(name, found.providers)
    state = _state()
    entries = [_row(p, state) | {"target": p.target, "location": p.location} | _facts(p) for p in matching]
    if as_json:
        _echo_json(entries)
        return
    for entry in entries:
        for key, value in entry.items():
            click.echo(f"{key + ':':<14}{value if isinstance(value, str) else json.dumps(value)}")
        click.echo()


def _facts(provider: Provider) -> dict[str, Any]:
    shown = {key: value for key, value in (provider.facts or {}).items() if key not in {"kind", "name", "summary"}}
    return {"manifest": provider.manifest_path or "none", "api": KINDS[provider.kind].version + " here", "facts": shown}


@command.command()
@click.argument("kind", type=_kind)
@click.option("--device", default="cpu", show_default=True, help="Device it should run on.")
@click.option("--dtype", help="Type it should compute in, such as bfloat16.")
@click.option("--head-dim", type=click.IntRange(1), help="Size of an attention head.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(kind: str, device: str, dtype: str | None, head_dim: int | None, as_json: bool) -> None:
    """Show in which order `auto` considers the plugins of KIND, and what speaks against each.

    Only what can be told without a model and without importing anything; `pluglm explain` tells the rest.
    """
    from pluglm.cli.selection import ranked

    rows = ranked(discover().providers, _state(), kind, device=device, dtype=dtype, head_dim=head_dim)
    if as_json:
        _echo_json(rows)
        return
    if not rows:
        click.echo(f"No plugins are installed of kind {kind}.")
        return
    from pluglm.cli.render import print_table

    table = [(str(row["order"] or "-"), row["id"], row["tier"], "; ".join(row["refusals"]) or "usable") for row in rows]
    print_table(("order", "id", "tier", "verdict"), table)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check every installed plugin; exits with 1 if there are errors, with 0 if there are only warnings."""
    from pluglm.cli.doctor import examine

    found = discover(index=None)
    findings = examine(found, sys.path)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        _echo_json([{"severity": f.severity, "subject": f.subject, "message": f.message} for f in findings])
    else:
        for finding in findings:
            colour = "red" if finding.severity == "error" else "yellow"
            click.echo(f"{click.style(finding.severity, fg=colour)}: {finding.subject}: {finding.message}")
        warnings = len(findings) - errors
        click.echo(f"{len(found.providers)} plugins, {errors} errors, {warnings} warnings.")
    ctx.exit(1 if errors else 0)


@command.command()
@click.argument("name")
def enable(name: str) -> None:
    """Switch a plugin, or all plugins of a distribution, on again."""
    from pluglm.state import enable as switch

    click.echo(f"Enabled {switch(name, discover().providers)}.")


@command.command()
@click.argument("name")
def disable(name: str) -> None:
    """Switch a plugin, or all plugins of a distribution, off. It stays installed."""
    from pluglm.state import disable as switch

    click.echo(f"Disabled {switch(name, discover().providers)}.")


@command.command("build-manifest")
@click.argument("path", type=click.Path(), default=".")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if pluglm.json is absent or out of date.")
@click.pass_context
def build_manifest(ctx: click.Context, path: str, check: bool) -> None:
    """Make a plugin's pluglm.json from the [tool.pluglm] table of its pyproject.toml.

    PATH is that file or its folder; without it, the current folder. A package that provides nothing needs none.
    """
    from pathlib import Path

    from pluglm.manifest_build import prepare_manifest, provides_nothing, write_manifest

    if provides_nothing(Path(path)):
        click.echo(f"{path} declares no pluglm provider, so there is no pluglm.json to make.")
        return
    prepared = prepare_manifest(Path(path))
    _warn(prepared.warnings)
    if not check:
        write_manifest(prepared)
        click.echo(f"Wrote {prepared.path}.")
    elif prepared.stale:
        click.echo(f"{prepared.path} is absent or out of date; run `pluglm plugins build-manifest {path}`.", err=True)
        ctx.exit(1)
    else:
        click.echo(f"{prepared.path} is up to date.")


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(click.style("warning: ", fg="yellow") + warning, err=True)


@command.command()
def schema() -> None:
    """Print the JSON schema of pluglm.json."""
    from pluglm.manifest import json_schema

    _echo_json(json_schema())
