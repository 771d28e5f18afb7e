"""Cache layouts of one loaded model beside the planned one: for `cache_implementation`, and for caches of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm_hf.refusals import unknown, unsupported

if TYPE_CHECKING:
    from pluglm.contracts.cache import CacheLayout
    from pluglm.lm import LanguageModel

#: cache_implementation -> the layout. Another name is taken as a provider's own.
IMPLEMENTATIONS: Mapping[str, str] = {
    "dynamic": "dynamic", "static": "static", "offloaded": "offloaded", "quantized": "quantized",
    "sliding_window": "hybrid", "hybrid": "hybrid", "hybrid_chunked": "hybrid",
}  # fmt: skip
_REFUSED: Mapping[str, tuple[str, str]] = {
    "paged": ("pages are read by an attention backend of their own, which is chosen when a model is loaded.",
              'Use pluglm.load(…, cache="paged").'),
    **dict.fromkeys(("offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"), (
        "cells on the host have no fixed addresses.", 'Pass cache_implementation="offloaded" or "static".',
    )),
}  # fmt: skip
#: Keys of a quantized cache's settings -> the option of the layout.
QUANTIZED: Mapping[str, str] = {"nbits": "bits", "q_group_size": "group_size", "residual_length": "residual"}
#: What the reference's quantized caches are if nobody says otherwise.
QUANTIZED_DEFAULTS: Mapping[str, int] = {"nbits": 4, "q_group_size": 64, "residual_length": 128}


class Layouts:
    """Builds layouts for one model, each once. They fit the attention backend that the plan chose."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._built: dict[tuple[str, tuple[tuple[str, Any], ...]], CacheLayout] = {}

    def planned(self) -> CacheLayout:
        """That of the plan. Raises InputError for a model that keeps nothing."""
        if self._lm.model.layout is None:
            raise InputError("this model has nothing to cache.", fix="Leave the cache out.", argument="use_cache")
        return self._lm.model.layout

    def of(self, name: str, options: Mapping[str, Any]) -> CacheLayout:
        """The layout of a provider's name, `name:variant`, with these options.

        Raises: PluginNotFoundError, UnsupportedRequestError.
        """
        from pluglm.build import build
        from pluglm.contracts.cache import CacheRequest
        from pluglm.planner import Demand, Planner, wish

        planned = self.planned()
        if name == planned.name and not options:
            return planned
        key = (name, tuple(sorted(options.items())))
        if key not in self._built:
            # What was loaded, and by which plugins: a front end of pluglm's own may look.
            manager, context = self._lm._manager, self._lm._context
            choice = Planner(manager).single(
                "cache", wish("cache", name, key[1]), Demand(context.device, context.dtype), "asked for by a call"
            )
            description, program = context.description, context.description.program
            self._built[key] = build(manager, choice, "pluglm_build_cache", request=CacheRequest(
                description.slots, (planned.view,), context.device, context.dtype, (), description.max_seq_len,
                rotations=program.rotations() if program is not None else None,
                learned_positions=program is not None and program.embedding.learned_positions is not None,
                variant=choice.variant, options=choice.options,
            ))  # fmt: skip
        return self._built[key]


def read_implementation(name: Any, config: Any) -> tuple[str, dict[str, Any]]:
    """The layout and its options that `cache_implementation` and `cache_config` mean.

    Raises: InputError, UnsupportedRequestError.
    """
    if not isinstance(name, str):
        raise InputError(f"cache_implementation={name!r} is no name.", fix=f"Pass {', '.join(IMPLEMENTATIONS)}.",
                         argument="cache_implementation")  # fmt: skip
    if name in _REFUSED:
        raise unsupported("cache_implementation", name, *_REFUSED[name])
    if config is not None and not isinstance(config, Mapping):
        config = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    settings = {k: v for k, v in (config or {}).items() if v is not None}
    layout = IMPLEMENTATIONS.get(name, name)
    if layout == "quantized":
        return quantized(settings)
    settings.pop("max_cache_len", None) if layout == "static" else None
    return layout, settings


def quantized(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A quantized layout and its options. settings: as `cache_config` has them, `backend` among them.

    The backend "quanto" means the layout's own scales; both need no package but, for "hqq", hqq.
    """
    known = {"backend", "axis_key", "axis_value", *QUANTIZED}
    for key in settings:
        if key not in known:
            raise unknown("a quantized cache", key, known)
    backend = str(settings.get("backend", "quanto")).lower()
    if backend not in ("quanto", "hqq"):
        raise unsupported("backend", settings["backend"], "the layout packs numbers as integers.",
                          'Pass "quanto" or "hqq".')  # fmt: skip
    for axis in ("axis_key", "axis_value"):
        if settings.get(axis, 0) not in (0, -1, 1):
            raise InputError(f"{axis}={settings[axis]!r} makes no sense.", fix="Leave it out.", argument=axis)
        if settings.get(axis, 0) != 0:
            raise unsupported(axis, settings[axis], "keys share a scale by channel, values by token (KIVI).",
                              "Leave it out.")  # fmt: skip
    said = {**QUANTIZED_DEFAULTS, **{k: v for k, v in settings.items() if k in QUANTIZED}}
    options = {QUANTIZED[key]: value for key, value in said.items()}
    return ("quantized:hqq" if backend == "hqq" else "quantized"), options
