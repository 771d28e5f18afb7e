"""`pluglm vendor SOURCE`: fetch, show, ask, build, install. One step a function; nothing is built before consent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pluglm.errors import InputError
from pluglm_vendor.fetch import fetch
from pluglm_vendor.install import check_name, install
from pluglm_vendor.needs import check, missing, read_requirements
from pluglm_vendor.page import Page
from pluglm_vendor.reading import read_code
from pluglm_vendor.recipe import Recipe, provider_name, read_folder
from pluglm_vendor.sources import FolderSource, parse_source
from pluglm_vendor.wheel import write_wheel


@click.command("vendor")
@click.argument("source")
@click.option("--name", help="What users will type as decoding=…; left out: the repository's name.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Folder for the wheel; left out: ./"
)
@click.option("--install", "wants_install", is_flag=True, help="Install the wheel with this interpreter's pip.")
@click.option("--with-deps", is_flag=True, help="With --install: let pip install what the recipe requires, too.")
@click.option("--yes", is_flag=True, help="Agree without being asked. The same is printed.")
@click.option("--token", help="Access token of the Hub; left out: the one its client has stored.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; what people read goes to the error stream.")
def command(
    source: str, name: str | None, out: Path, wants_install: bool, with_deps: bool, yes: bool, token: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Make the decoding method of SOURCE a plugin: hub:ORG/REPO@COMMIT (40 hex digits), or a folder.

    The files are fetched into quarantine and shown with their digests; on consent a wheel is built from exactly these
    bytes. Nothing of them is run here, and nothing importable exists before consent.
    """
    if with_deps and not wants_install:
        raise click.UsageError("--with-deps goes with --install.")
    page, requirements = examine(source, name, token)
    for line in page.lines():
        click.echo(line, err=as_json)
    error = missing(page.recipe.repo, page.needs)
    if error is not None and wants_install and not with_deps:
        raise error
    if error is not None:
        click.echo(click.style(f"\nwarning: {error.what}", fg="yellow"), err=True)
    consent(page, yes=yes, err=as_json)
    wheel = write_wheel(page.recipe, page.name, requirements, out)
    _audit("built", page.recipe, str(wheel))
    if wants_install:
        install(wheel, with_deps=with_deps)
        _audit("installed", page.recipe, str(wheel))
    if as_json:
        click.echo(json.dumps({**page.facts(), "wheel": str(wheel), "installed": wants_install}, indent=2))
        return
    click.echo(f"Wrote {wheel}.")
    click.echo(f'Installed. Use it: lm.generate("…", decoding={page.name!r})' if wants_install else "Next:")
    if not wants_install:
        click.echo(f"  pip install {wheel}")
        click.echo(f"  pluglm plugins info {page.name}")


def examine(text: str, name: str | None, token: str | None) -> tuple[Page, list[Any]]:
    """Everything that is known of a source before consent, and its requirements. Writes to the quarantine only.

    Raises: InputError, ModelError, PluginConflictError, SaveError.
    """
    source = parse_source(text)
    if name is not None:
        provider_name("", name)  # a mistake in the name is told before anything is fetched
    recipe = read_folder(source) if isinstance(source, FolderSource) else fetch(source, token)
    _audit("fetched", recipe, "")
    chosen = provider_name(recipe.repo, name)
    requirements = read_requirements(recipe.repo, recipe.requirements)
    reading = read_code(recipe.repo, recipe.files)
    page = Page(recipe, chosen, reading, check(requirements), check_name(recipe, chosen))
    return page, [requirement for _, requirement in requirements]


def consent(page: Page, *, yes: bool, err: bool) -> None:
    """Ask, unless the answer was given. Raises: InputError without a terminal to ask on; click.Abort for a no."""
    if yes:
        _audit("consented", page.recipe, "--yes")
        return
    if not sys.stdin.isatty():
        _audit("refused", page.recipe, "no terminal")
        raise InputError(
            "nothing was built: nobody was there to agree to it.",
            why="there is no terminal to ask on, and silence is no consent.",
            fix="Run it on a terminal, or add --yes once you have read the code.",
            argument="yes",
        )
    click.echo("", err=err)
    if not click.confirm("Build a plugin from this code?", default=False, err=err):
        _audit("refused", page.recipe, "answered no")
        click.echo("Nothing was built.", err=True)
        raise click.exceptions.Exit(1)
    _audit("consented", page.recipe, "answered yes")


def _audit(step: str, recipe: Recipe, detail: str) -> None:
    """One event a step, for audit hooks: "fetched", "consented", "refused", "built", "installed"."""
    sys.audit("pluglm.vendor", step, recipe.source, recipe.digest, detail)
