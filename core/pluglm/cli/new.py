"""`pluglm new KIND NAME`: write a working plugin from a template."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("new")
@click.argument("kind")
@click.argument("name")
@click.option("--path", type=click.Path(path_type=Path), help="Folder to write; left out: ./pluglm-KIND-NAME.")
def command(kind: str, name: str, path: Path | None) -> None:
    """Write a plugin of KIND that users will choose as NAME. It installs and passes its tests as it stands."""
    from pluglm.scaffold import Scaffold

    scaffold = Scaffold(kind, name)
    folder = scaffold.write(path or Path(scaffold.distribution))
    click.echo(f"Wrote {scaffold.distribution} to {folder}.")
    click.echo("Next:")
    click.echo(f"  pip install -e {folder if folder.is_absolute() else f'./{folder}'}")
    click.echo(f"  pluglm plugins info {scaffold.distribution}:{kind}/{name}")
    click.echo(f"  pytest {folder}")
