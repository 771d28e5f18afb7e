"""Caches that are made before a model is known: each takes its form at the first call that it is passed to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm_hf.cache_face import CacheFace
from pluglm_hf.layouts import Layouts, quantized
from pluglm_hf.legacy import fill, pairs_of
from pluglm_hf.refusals import unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.cache import Cache, CacheLayout
    from pluglm.forward import BuiltModel

Pairs = tuple[tuple["Tensor", "Tensor"], ...]


class HFCache(CacheFace):
    """A cache that belongs to the first model it is passed to, and to no other.

    Args:
        config: of the model that it is for; checked when it is passed to one.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self._config = config
        self._module: Any = None  # of the model that it belongs to
        self._pairs: Pairs = ()

    def layout(self, layouts: Layouts) -> CacheLayout:
        """The layout that it takes."""
        return layouts.planned()

    def capacity(self, needed: int | None) -> int | None:
        """Cells to make room for. needed: by the call that it is first passed to, as far as is known."""
        return needed

    def settle(self, model: BuiltModel, layouts: Layouts, rows: int, needed: int | None = None) -> Cache:
        """The cache of pluglm, made if there is none yet. rows, needed: of the call.

        Raises: InputError for another model than before, or than its configuration names.
        """
        if self._module is not None and self._module is not model.module:
            raise InputError(
                "this cache belongs to another model.", why="keys and values of one model mean nothing to another.",
                fix="Make a cache for each model.", argument="past_key_values",
            )  # fmt: skip
        if self.inner is None:
            self._check_config(model)
            layout = self.layout(layouts)
            room = self.capacity(needed) or model.description.max_seq_len
            made = layout.new(batch_size=self._pairs[0][0].shape[0] if self._pairs else rows, capacity=room)
            if self._pairs:
                fill(made, self._pairs)
                self._pairs, self._known = (), False
            self.inner = made
        self._module = model.module
        return self.inner

    def adopt(self, model: BuiltModel, cache: Cache) -> None:
        """Be the face of this cache of this model."""
        self.inner, self._module = cache, model.module
        self.grown()

    def grown(self) -> None:
        """A strategy has fed it: what it begins with is no longer known."""
        self._start, self._known = None, False

    def bind(self, model: BuiltModel, batch_size: int) -> Cache:
        """As of a face that was passed to a model which knows no layouts. Raises InputError if none is made yet."""
        if self.inner is None:
            return self.settle(model, _Planned(model), batch_size)
        return self.inner

    def _check_config(self, model: BuiltModel) -> None:
        said = getattr(self._config, "model_type", None)
        if said is not None and said != model.description.model_type:
            raise InputError(
                f"this cache was made for a {said} model, and is passed to a {model.description.model_type}.",
                fix="Make it with config=model.config of the same model.", argument="past_key_values",
            )  # fmt: skip

    # Keys and values, as older code reads them

    def to_legacy_cache(self) -> Pairs:
        """One pair of keys and values a layer, copies: [B, K, S, D] and [B, K, S, Dv]."""
        if self.inner is None:
            return self._pairs
        return pairs_of(self.inner)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.to_legacy_cache()[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.to_legacy_cache())

    @property
    def key_cache(self) -> list[Tensor]:
        """Keys of each layer, copies."""
        return [k for k, _ in self.to_legacy_cache()]

    @property
    def value_cache(self) -> list[Tensor]:
        """Values of each layer, copies."""
        return [v for _, v in self.to_legacy_cache()]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cells a row holds, padding included."""
        return self._pairs[0][0].shape[2] if self.inner is None and self._pairs else super().get_seq_length(layer_idx)


class DynamicCache(HFCache):
    """Grows with the text, in the layout that the model's plan chose.

    Args:
        ddp_cache_data: pairs of keys and values, as of `from_legacy_cache`. config: see `HFCache`.
        offloading: keep cells on the host.
    """

    def __init__(
        self, ddp_cache_data: Iterable[Sequence[Tensor]] | None = None, config: Any = None, offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(config)
        if offload_only_non_sliding:
            raise unsupported("offload_only_non_sliding", True, "all cells are kept on the host, or none.",
                              "Leave it out.")  # fmt: skip
        self._offloading = offloading
        if ddp_cache_data is not None:
            if not isinstance(ddp_cache_data, Iterable):
                raise InputError(f"ddp_cache_data is a {type(ddp_cache_data).__name__}.",
                                 why="it holds a pair of keys and values for each layer.",
                                 fix="Pass the pairs, or leave it out; a config goes by its name, config=….",
                                 argument="ddp_cache_data")  # fmt: skip
            self._pairs = tuple((entry[0], entry[1]) for entry in ddp_cache_data)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Sequence[Tensor]] | None = None) -> DynamicCache:
        """A cache with these keys and values, without padding: position i in cell i."""
        return cls(past_key_values)

    def layout(self, layouts: Layouts) -> CacheLayout:
        """`offloaded`, or the plan's; `dynamic` where that one needs a capacity."""
        return layouts.of("offloaded", {}) if self._offloading else layouts.planned()


class StaticCache(HFCache):
    """Room for `max_cache_len` cells, made at once.

    Args:
        config: see `HFCache`. max_cache_len: cells. max_batch_size (or batch_size), device, dtype: of older code; what
            the model has must be the same.
    """

    def __init__(
        self, config: Any = None, max_cache_len: int | None = None, offloading: bool = False,
        offload_only_non_sliding: bool = True, *, max_batch_size: int | None = None, batch_size: int | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        if type(max_cache_len) is not int or max_cache_len < 1:
            raise InputError(
                f"max_cache_len={max_cache_len!r} makes no sense: it must be an integer >= 1.",
                fix="Pass as many cells as prompt and new tokens need.", argument="max_cache_len",
            )  # fmt: skip
        if offloading:
            raise unsupported("offloading", True, "cells on the host have no fixed addresses.",
                              "Use DynamicCache(offloading=True).")  # fmt: skip
        if not offload_only_non_sliding:
            raise unsupported("offload_only_non_sliding", False, "nothing is offloaded.", "Leave it out.")
        self.max_cache_len = max_cache_len
        self._rows = max_batch_size if max_batch_size is not None else batch_size
        self._place = {"device": device, "dtype": dtype}

    def settle(self, model: BuiltModel, layouts: Layouts, rows: int, needed: int | None = None) -> Cache:
        """As above; what was said of rows, device and dtype must be so."""
        if self._rows not in (None, rows):
            raise InputError(f"this cache was made for {self._rows} rows, the input has {rows}.",
                             fix="Make it for this batch.", argument="past_key_values")  # fmt: skip
        for name, said in self._place.items():
            has = str(getattr(model, name))
            if said is not None and not has.removeprefix("torch.").startswith(str(said).removeprefix("torch.")):
                raise InputError(f"this cache was made for {name} {said}, the model has {has}.",
                                 fix="Leave it out.", argument=name)  # fmt: skip
        return super().settle(model, layouts, rows, needed)

    def layout(self, layouts: Layouts) -> CacheLayout:
        """`static`."""
        return layouts.of("static", {})

    def capacity(self, needed: int | None) -> int:
        """What was asked for; a call that needs more is refused before it writes."""
        return self.max_cache_len

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Cells a row can hold."""
        return self.max_cache_len

    get_max_length = get_max_cache_shape


class QuantizedCache(HFCache):
    """Old cells packed, recent ones as they are.

    Args:
        backend: "quanto": the layout's own scales (the package is not needed); "hqq". config: see `HFCache`.
        nbits, q_group_size, residual_length: as there; None: 4, 64, 128. axis_key, axis_value: 0, see the README.
        cache_config: all of these in one object or dict, as older code has them.
    """

    def __init__(
        self, backend: Any = "quanto", config: Any = None, nbits: int | None = None, axis_key: int = 0,
        axis_value: int = 0, q_group_size: int | None = None, residual_length: int | None = None, *,
        cache_config: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        said = {
            "backend": backend, "nbits": nbits, "axis_key": axis_key, "axis_value": axis_value,
            "q_group_size": q_group_size, "residual_length": residual_length,
        }  # fmt: skip
        if cache_config is not None:
            said.update(cache_config if isinstance(cache_config, dict) else vars(cache_config))
        self._name, self._options = quantized({k: v for k, v in said.items() if v is not None})

    def layout(self, layouts: Layouts) -> CacheLayout:
        """`quantized`."""
        return layouts.of(self._name, self._options)


class _Planned(Layouts):
    """The planned layout of a bare model, and no other."""

    def __init__(self, model: BuiltModel) -> None:
        self._model = model

    def planned(self) -> CacheLayout:
        """The model's."""
        if self._model.layout is None:
            raise InputError("this model has nothing to cache.", fix="Leave the cache out.", argument="use_cache")
        return self._model.layout

    def of(self, name: str, options: Any) -> CacheLayout:
        """Refused but for the planned one."""
        if name != self.planned().name:
            raise InputError(
                f"a {name} cache cannot be made here.", why="a bare model knows its planned layout only.",
                fix="Pass the cache to a model of pluglm_hf first.", argument="past_key_values",
            )  # fmt: skip
        return self.planned()


def check_cache(cache: Any) -> None:
    """Raise InputError for the older tuples, and for what else is no cache."""
    from pluglm.contracts.cache import Cache

    if cache is None or isinstance(cache, CacheFace | Cache):
        return
    pairs = isinstance(cache, tuple)
    raise InputError(
        f"past_key_values is a {type(cache).__name__}, not a cache.",
        why="pairs of keys and values do not say which of their cells are padding." if pairs else "",
        fix="Pass DynamicCache.from_legacy_cache(pairs)." if pairs else "Pass DynamicCache().",
        argument="past_key_values",
    )  # fmt: skip


def settled(cache: Any, model: BuiltModel, layouts: Layouts, rows: int, needed: int | None = None) -> Cache | None:
    """The cache of pluglm behind what a caller passed as past_key_values. Raises as `check_cache`."""
    check_cache(cache)
    if isinstance(cache, HFCache):
        return cache.settle(model, layouts, rows, needed)
    if isinstance(cache, CacheFace):
        return cache.bind(model, rows)
    kept: Cache | None = cache
    return kept
