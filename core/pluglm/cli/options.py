"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel

F = TypeVar("F", bound=Callable[..., Any])

_PARTS = (
    "architecture", "attention", "cache", "quantizer", "decoding", "executor", "tokenizer", "format", "constraint",
)  # fmt: skip


def part_options(command: F) -> F:
    """-m's companions: where the model is and which parts run it."""
    options = [
        click.option("--revision", help="Branch, tag or commit of a Hub repository."),
        click.option("--offline", is_flag=True, default=None, help="Use only what is on this machine."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"),
        click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16 …; auto: the checkpoint's."),
        *(
            click.option(f"--{kind}", metavar="NAME[:VARIANT]", help=f"The {kind} provider, or its full id.")
            for kind in _PARTS
        ),
        click.option(
            "--packed-cache", is_flag=True, default=None, help="Keep what the quantizer packs for later loads."
        ),
        click.option(
            "--option",
            "part_option",
            multiple=True,
            metavar="KIND.NAME=JSON",
            help="A keyword option of one part, repeatable.",
        ),
    ]
    return _decorate(command, options)


def model_options(command: F) -> F:
    """-m MODEL and the options of `part_options`."""
    model = click.option("-m", "--model", help="A folder, an installed source's name, or org/name on the Hub.")
    return _decorate(part_options(command), [model])


def generation_options(command: F) -> F:
    """Fields of GenerationConfig."""
    options = [
        click.option("-n", "--max-new-tokens", type=int, help="New tokens at most."),
        click.option("--temperature", type=float, help="Sample, dividing scores by this; left out: greedy."),
        click.option("--top-k", type=int, help="Sample from the k best tokens."),
        click.option("--top-p", type=float, help="Sample from the smallest set of tokens with this probability."),
        click.option(
            "--min-p", type=float, help="Sample from tokens with at least this share of the best one's probability."
        ),
        click.option("--repetition-penalty", type=float, help="Above 1: tokens that were used become less likely."),
        click.option("--seed", type=int, help="Of the sampling; the same seed gives the same text."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text, repeatable."),
        click.option("--num-return-sequences", type=int, help="Several samples of one prompt."),
    ]
    return _decorate(command, options)


def grammar_options(command: F) -> F:
    """What the new text must follow; one of them at most."""
    options = [
        click.option("--json-schema", metavar="FILE|JSON", help="The new text is JSON that follows this schema."),
        click.option("--regex", metavar="REGEX", help="The new text as a whole matches this regular expression."),
        click.option("--grammar", type=click.File(), metavar="FILE", help="The new text follows this Lark grammar."),
    ]
    return _decorate(command, options)


def constraint_of(arguments: dict[str, Any]) -> dict[str, str] | None:
    """Parsed options of `grammar_options` as the `constraint` of `generate`."""
    said: dict[str, str] = {}
    if (schema := arguments.get("json_schema")) is not None:
        said["json_schema"] = schema if schema.lstrip()[:1] == "{" else _contents(schema)
    if arguments.get("regex") is not None:
        said["regex"] = arguments["regex"]
    if arguments.get("grammar") is not None:
        said["lark"] = arguments["grammar"].read()
    if len(said) > 1:
        raise click.UsageError("give one of --json-schema, --regex and --grammar")
    return said or None


def _contents(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise click.BadParameter(
            f"{path!r} is neither a file that can be read nor a JSON object: {e}", param_hint="--json-schema"
        ) from e


def _decorate(command: F, options: list[Any]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def load_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """Parsed options as (named parts, options of parts, the rest of `load`'s arguments)."""
    parts = {kind: arguments[kind] for kind in _PARTS if arguments.get(kind) is not None}
    options: dict[str, dict[str, Any]] = {}
    for text in arguments.get("part_option") or ():
        place, equals, value = text.partition("=")
        kind, dot, name = place.partition(".")
        if not (equals and dot and kind in _PARTS and name):
            raise click.BadParameter(
                f"{text!r} is not KIND.NAME=JSON, such as cache.capacity=4096", param_hint="--option"
            )
        try:
            options.setdefault(kind, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            options.setdefault(kind, {})[name] = value
    rest = {
        k: arguments[k]
        for k in ("revision", "offline", "device", "dtype", "packed_cache")
        if arguments.get(k) is not None
    }
    return parts, options, rest


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Parsed options as the settings of `generate`."""
    names = (
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
        "num_return_sequences",
    )  # fmt: skip
    settings = {name: arguments[name] for name in names if arguments.get(name) is not None}
    if arguments.get("stop"):
        settings["stop_strings"] = tuple(arguments["stop"])
    return settings


def load_model(arguments: dict[str, Any]) -> LanguageModel:
    """The model that the parsed options name; without -m, the default one of this environment."""
    from pluglm.loading import load
    from pluglm.manager import Manager
    from pluglm.sources import default_model

    manager = Manager.installed()
    parts, options, rest = load_arguments(arguments)
    model = arguments.get("model") or default_model(manager.registry)
    return load(model, **parts, options=options, **rest, manager=manager)
