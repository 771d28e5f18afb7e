"""`pluglm measure`: time the candidates of `auto` on this machine, and keep the order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pluglm.cli.options import load_arguments, model_options

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel
    from pluglm.manager import Manager
    from pluglm.provider import Provider


@click.command("measure")
@click.argument("kind", required=False, type=click.Choice(["attention", "cache", "executor"]))
@model_options
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens before.")
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="Tokens decoded a round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Alternating rounds.")
@click.option("--dry-run", is_flag=True, help="Print the times, keep none.")
@click.option("--forget", is_flag=True, help="Delete all scores instead; the order is by id again.")
def command(
    kind: str | None, model: str | None, prompt_tokens: int, tokens: int, rounds: int, dry_run: bool, forget: bool,
    **arguments: Any,
) -> None:  # fmt: skip
    """Time every plugin of KIND that `auto` could choose for a model, and let the order decide within a tier.

    The times are kept in scores.json beside the list of disabled plugins, for this device and dtype.
    """
    from pluglm.scores import Score, device_name, forget_scores, load_scores, save_scores

    if forget:
        click.echo("The scores are deleted." if forget_scores() else "There were no scores.")
        return
    if kind is None:
        raise click.UsageError("name a KIND: attention, cache or executor")
    from pluglm.loader import Loader
    from pluglm.manager import Manager
    from pluglm.measure import measure
    from pluglm.request import read_request
    from pluglm.sources import default_model

    named, options, rest = load_arguments(arguments)
    if kind in named:
        raise click.UsageError(f"--{kind} names the part that is to be measured; leave it out")
    manager = Manager.installed()
    place = model or default_model(manager.registry)
    plan = Loader(read_request(place, named, options, **rest), manager).plan()
    choice = plan[kind]
    able = [choice.provider, *(r.provider for r in choice.rejected if r.reasons == ("next in line",))]
    providers = [manager.registry.find(kind, name)[0] for name in able if name is not None]
    rest |= {"device": plan.device, "dtype": plan.dtype}
    done = measure(
        providers, _loading(place, kind, named, options, rest, manager),
        prompt=prompt_tokens, tokens=tokens, rounds=rounds,
    )  # fmt: skip
    date = datetime.now(UTC).isoformat(timespec="seconds")
    for c in done:
        spread = f" (rounds {min(c.rounds_ms):.3g} to {max(c.rounds_ms):.3g})" if c.rounds_ms else ""
        click.echo(f"{c.provider.id}: {c.problem or f'{c.token_ms:.3g} ms a token{spread}'}")
    if dry_run:
        return
    scores = [
        Score(c.provider.id, c.provider.version, device_name(plan.device), plan.dtype, c.token_ms, place, date)
        for c in done if c.rounds_ms
    ]  # fmt: skip
    click.echo(f"Kept in {save_scores(load_scores().with_(scores))}.")


def _loading(
    place: str, kind: str, named: dict[str, Any], options: dict[str, Any], rest: dict[str, Any], manager: Manager
) -> Any:
    """How to load the model with one provider of `kind` named."""
    from pluglm.loading import load

    def load_with(provider: Provider) -> LanguageModel:
        return load(place, **{**named, kind: provider.id}, options=options, manager=manager, **rest)

    return load_with
