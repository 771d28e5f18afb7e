"""The root command, and how errors end the program."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from pluglm.cli.root import RootGroup
from pluglm.errors import PluglmError

COMMANDS = {
    "generate": ("pluglm.cli.generate", "Complete a prompt with a model."),
    "chat": ("pluglm.cli.chat", "Talk with a model."),
    "explain": ("pluglm.cli.explain", "Show which parts would run a model, and why."),
    "measure": ("pluglm.cli.measure", "Time the plugins that could run a model here, and keep the order."),
    "new": ("pluglm.cli.new", "Write a plugin from a template."),
    "plugins": ("pluglm.cli.plugins", "List, check and switch plugins; imports none of them."),
}


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from pluglm.metadata import installed_versions

        click.echo(f"pluglm {installed_versions(sys.path).get('pluglm', '(not installed)')}")
        ctx.exit()


@click.group(
    cls=RootGroup,
    lazy=COMMANDS,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Run transformer language models whose every part is a plugin."""
    ctx.obj = {"debug": debug}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 an error of pluglm, 2 a mistake in the arguments, 130 interrupted.

    Args:
        arguments: what to run; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(arguments, prog_name="pluglm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away, as `| head` does
        code = 1
    except PluglmError as error:
        if "--debug" in arguments:
            raise
        click.echo(
            click.style(f"{type(error).__name__}: ", fg="red", bold=True) + click.style(str(error), fg="red"), err=True
        )
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
