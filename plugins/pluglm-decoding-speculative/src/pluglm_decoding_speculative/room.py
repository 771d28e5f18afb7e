"""What runs the prompt: a cache with room for the holes that rows of different luck leave, or the caller's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pluglm_decoding_blocks.feed import CachedFeed, further_arguments
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings

from pluglm.errors import InputError
from pluglm_decoding_speculative.assistant import check_rollback
from pluglm_decoding_speculative.choosing import Chooser, SpeculativeSampled


def make_feed(
    model: Any, prompt: Prompt, settings: Settings, limits: Sequence[int], model_kwargs: dict[str, Any], name: str,
    choose: Chooser,
) -> CachedFeed:  # fmt: skip
    """What runs the prompt, with a cache that has room for holes. limits: of all rows, copies included."""
    extra = further_arguments(model_kwargs)
    given = model_kwargs.get("past_key_values")
    if model_kwargs.get("use_cache") is False:
        raise InputError("use_cache=False cannot be combined with speculation.",
                         why="guesses are run behind what a cache holds, and taken back from it.",
                         fix='Leave use_cache out, or name decoding="greedy" or "sampling".',
                         argument="use_cache")  # fmt: skip
    if others := sorted(set(extra) - {"position_ids"}):
        raise InputError(
            f"{', '.join(others)} cannot be combined with speculation.",
            why="a pass runs several tokens of each row, some of which never count.",
            fix='Leave it out, or name decoding="greedy" or "sampling".', argument=others[0],
        )  # fmt: skip
    room = prompt.width + max(limits)
    # In the worst case every kept cell holds a token of one row only. Tokens that are drawn against a guess depend on
    # where it ends, so nothing of other rows may cut it short: then there is room for that case. Otherwise rows share
    # as many cells as they need, and as many again; `Run.room` shortens guesses once these are used up.
    holes = sum(limits) - max(limits)
    if not isinstance(choose, SpeculativeSampled) and given is None:
        holes = min(holes, max(limits))
    if given is None or isinstance(choose, SpeculativeSampled):
        room += holes
    cache = given
    if given is not None and len(limits) > 1:
        _check_alignable(given)
    feed = CachedFeed(model, prompt, settings, room=room, given=cache, extra=extra)
    check_rollback(feed.cache, "model", name)
    return feed


def _check_alignable(cache: Any) -> None:
    """Can a caller's cache of several rows be left without the holes that speculation makes?"""
    kinds = sorted({slot.kind for slot in cache.slots} - {"kv", "latent", "cross", "shared"})
    if kinds or "crop" not in cache.operations:
        raise InputError(
            f"the given cache ({cache.layout}) of several rows cannot be used by speculation.",
            why="rows that go ahead by different numbers of tokens leave holes, and to close them it must go back to "
            f"the end of the prompt; slots of kind {', '.join(kinds) or '?'} cannot.",
            fix="Pass one row at a time, or leave past_key_values out.", argument="past_key_values",
        )  # fmt: skip
