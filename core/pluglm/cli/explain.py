"""`pluglm explain MODEL`: which part would do what, and why, without loading a weight."""

from __future__ import annotations

import json
from typing import Any

import click

from pluglm.cli.options import load_arguments, part_options


@click.command("explain")
@click.argument("model", required=False)
@part_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print the plan as JSON; `load(plan=Plan.from_json(…))` replays it."
)
@click.option("--program", is_flag=True, help="Print the architecture's DecoderProgram: the model on one page.")
def command(model: str | None, as_json: bool, program: bool, **arguments: Any) -> None:
    """Print the plan for MODEL: chosen parts, reasons, and what was not chosen and why."""
    from pluglm.loader import Loader
    from pluglm.manager import Manager
    from pluglm.request import read_request
    from pluglm.sources import default_model

    manager = Manager.installed()
    named, options, rest = load_arguments(arguments)
    loader = Loader(read_request(model or default_model(manager.registry), named, options, **rest), manager)
    plan = loader.plan()
    if program:
        from pluglm.cli.program_page import program_page

        described = loader.context.description.program
        click.echo(
            json.dumps(described.to_json() if described else None)
            if as_json
            else program_page(loader.context.description)
        )
    else:
        click.echo(json.dumps(plan.to_json(), indent=1) if as_json else str(plan))
