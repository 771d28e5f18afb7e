"""`pluglm vendor SOURCE`: fetch, show, ask, build, install. One step a function; nothing is built before consent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from packaging.requirements import Requirement

from pluglm.errors import InputError
from pluglm.vendored_kernel import FUNCTIONS, METADATA, package_folder
from pluglm_vendor.bundle import Bundle, provider_name
from pluglm_vendor.fetch import fetch, fetch_kernel
from pluglm_vendor.install import check_name, install
from pluglm_vendor.kernel import Kernel, read_kernel_folder
from pluglm_vendor.needs import check, missing, read_requirements
from pluglm_vendor.page import Page
from pluglm_vendor.reading import read_code, read_package
from pluglm_vendor.recipe import read_folder
from pluglm_vendor.sources import FolderSource, parse_source
from pluglm_vendor.variants import here
from pluglm_vendor.wheel import write_wheel


@click.command("vendor")
@click.argument("source")
@click.option("--kernel", "is_kernel", is_flag=True, help="Take a kernel of attention instead of a decoding method.")
@click.option("--variant", help="With --kernel: the build to take; left out: the one that fits the torch that is here.")
@click.option("--name", help="What users will type as decoding=… or attention=…; left out: the repository's name.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Folder for the wheel; left out: ./"
)
@click.option("--install", "wants_install", is_flag=True, help="Install the wheel with this interpreter's pip.")
@click.option("--with-deps", is_flag=True, help="With --install: let pip install what it requires, too.")
@click.option("--yes", is_flag=True, help="Agree without being asked. The same is printed.")
@click.option("--token", help="Access token of the Hub; left out: the one its client has stored.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; what people read goes to the error stream.")
def command(
    source: str, is_kernel: bool, variant: str | None, name: str | None, out: Path, wants_install: bool,
    with_deps: bool, yes: bool, token: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Make the decoding method of SOURCE, or its attention kernel, a plugin: hub:ORG/REPO@COMMIT (40 hex digits), or a
    folder.

    The files are fetched into quarantine and shown with their digests; on consent a wheel is built from exactly these
    bytes. Nothing of them is run here, and nothing importable exists before consent.
    """
    if with_deps and not wants_install:
        raise click.UsageError("--with-deps goes with --install.")
    if variant is not None and not is_kernel:
        raise click.UsageError("--variant goes with --kernel.")
    page, requirements = examine_kernel(source, variant, name, token) if is_kernel else examine(source, name, token)
    for line in page.lines():
        click.echo(line, err=as_json)
    error = missing(page.bundle.repo, page.needs)
    if error is not None and wants_install and not with_deps:
        raise error
    if error is not None:
        click.echo(click.style(f"\nwarning: {error.what}", fg="yellow"), err=True)
    consent(page, yes=yes, err=as_json)
    wheel = write_wheel(page.bundle, page.name, requirements, out)
    _audit("built", page.bundle, str(wheel))
    if wants_install:
        install(wheel, with_deps=with_deps)
        _audit("installed", page.bundle, str(wheel))
    if as_json:
        click.echo(json.dumps({**page.facts(), "wheel": str(wheel), "installed": wants_install}, indent=2))
        return
    click.echo(f"Wrote {wheel}.")
    use = page.bundle.use(page.name)
    how = f"pluglm.load(…, {use})" if is_kernel else f'lm.generate("…", {use})'
    click.echo(f"Installed. Use it: {how}" if wants_install else "Next:")
    if not wants_install:
        click.echo(f"  pip install {wheel}")
        click.echo(f"  pluglm plugins info {page.name}")


def examine(text: str, name: str | None, token: str | None) -> tuple[Page, list[Requirement]]:
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


def examine_kernel(
    text: str, variant: str | None, name: str | None, token: str | None
) -> tuple[Page, list[Requirement]]:
    """The same of a kernel. Imports torch, to ask which build fits it.

    Raises: as `examine`.
    """
    source = parse_source(text)
    if name is not None:
        provider_name("", name, Kernel.long)
    at = here()
    if isinstance(source, FolderSource):
        kernel = read_kernel_folder(source, variant, at)
    else:
        kernel = fetch_kernel(source, variant, at, token)
    _audit("fetched", kernel, "")
    chosen = provider_name(kernel.repo, name, Kernel.long)
    folder = package_folder(kernel.files)
    assert folder is not None  # looked for when it was fetched
    requirements = read_requirements(kernel.repo, kernel.requirements, METADATA)
    reading = read_package(kernel.repo, kernel.files, folder, FUNCTIONS)
    page = Page(kernel, chosen, reading, check(requirements), check_name(kernel, chosen))
    return page, [requirement for _, requirement in requirements]


def consent(page: Page, *, yes: bool, err: bool) -> None:
    """Ask, unless the answer was given. Raises: InputError without a terminal to ask on; click.Abort for a no."""
    if yes:
        _audit("consented", page.bundle, "--yes")
        return
    if not sys.stdin.isatty():
        _audit("refused", page.bundle, "no terminal")
        raise InputError(
            "nothing was built: nobody was there to agree to it.",
            why="there is no terminal to ask on, and silence is no consent.",
            fix="Run it on a terminal, or add --yes once you have read the code.",
            argument="yes",
        )
    click.echo("", err=err)
    if not click.confirm("Build a plugin from this code?", default=False, err=err):
        _audit("refused", page.bundle, "answered no")
        click.echo("Nothing was built.", err=True)
        raise click.exceptions.Exit(1)
    _audit("consented", page.bundle, "answered yes")


def _audit(step: str, bundle: Bundle, detail: str) -> None:
    """One event a step, for audit hooks: "fetched", "consented", "refused", "built", "installed"."""
    sys.audit("pluglm.vendor", step, bundle.source, bundle.digest, detail)
