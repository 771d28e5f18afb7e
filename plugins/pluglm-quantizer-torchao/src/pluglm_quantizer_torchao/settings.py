"""What a request asks for, in the user's words; what cannot be honoured is refused with every reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pluglm import UnsupportedRequestError
from pluglm.contracts import QuantizerRequest
from pluglm_quantizer_torchao.forms import VARIANTS, Form, default_form

#: The variant that `torchao` means.
DEFAULT = "int8"
#: Options of every variant: how the weights are kept where there are several ways, and whether the head is packed.
COMMON = ("packing", "head")


@dataclass(frozen=True)
class Settings:
    """How layers are packed, or are packed already.

    Attributes:
        variant: as users write it. form: the one of its forms. options: its options, all of them.
        device, dtype: where and in which compute dtype the layers run. head: it is packed too.
        prefix: of the names of packed tensors in a file. reads: the weights come packed.
    """

    variant: str
    form: Form
    options: Mapping[str, Any]
    device: str
    dtype: str
    head: bool = False
    prefix: str = "_weight_"
    reads: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        bits: int = self.options[self.form.bits] if isinstance(self.form.bits, str) else self.form.bits
        return bits

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides whether, and how, a layer runs."""
        return self.variant, self.form.packing, tuple(sorted(self.options.items())), self.device, self.dtype

    def config(self) -> Any:
        """torchao's config object. Raises ValueError if it knows no such combination of options."""
        from pluglm_quantizer_torchao.library import find

        form = self.form
        chosen = {option.field: option.turned(self.options[name]) for name, option in form.options.items()}
        fixed = {name: value() if callable(value) else value for name, value in form.fixed.items()}
        try:
            return find(form.config)(**fixed, **chosen)
        except AssertionError as e:
            raise ValueError(str(e)) from e


@dataclass
class Wanted:
    """Variant and options while they are read. reasons: what is wrong with them."""

    variant: str
    form: Form
    options: dict[str, Any]
    head: bool = False
    reasons: list[str] = field(default_factory=list)


def read(request: QuantizerRequest) -> Settings:
    """The settings of a request to pack plain weights.

    Raises: UnsupportedRequestError with every reason.
    """
    wanted = _wanted(request)
    device = request.device.partition(":")[0]
    reasons = [*wanted.reasons, *misplaced(wanted.variant, wanted.form, device, request.dtype)]
    settings = Settings(
        wanted.variant, wanted.form, wanted.options, request.device, request.dtype, wanted.head
    )  # fmt: skip
    if reasons:
        raise refused(*reasons)
    return settings


def refused(*reasons: str) -> UnsupportedRequestError:
    """The error of a request."""
    return UnsupportedRequestError(
        "the torchao quantizer cannot honour this request.", why="; ".join(reasons),
        fix='Write quantizer="torchao" or "torchao:int8"; its README lists the other variants and their options.',
        reasons=reasons,
    )  # fmt: skip


def misplaced(variant: str, form: Form, device: str, dtype: str) -> Iterator[str]:
    """Why a form does not run in a place, as far as that is known before it is tried."""
    what = variant if form.packing is None else f"{variant} with packing={form.packing!r}"
    if device not in form.devices:
        yield f"{what} runs on {' and '.join(form.devices)}, not on {device}: torchao 0.18 has no kernel for it there"
    if dtype not in form.dtypes:
        why = f" ({form.why_not[dtype]})" if dtype in form.why_not else ""
        yield f"compute dtype {dtype} is not among those of {what}: {', '.join(form.dtypes)}{why}"
    if form.needs is not None and device in form.devices:
        from importlib.util import find_spec

        if find_spec(form.needs) is None:
            yield f"{what} needs the package {form.needs}, which is not installed"
    if device == "cuda" and device in form.devices and form.capability is not None:
        yield from _too_old(what, form.capability)


def _too_old(what: str, least: tuple[int, int]) -> Iterator[str]:
    import torch

    if not torch.cuda.is_available():
        yield f"{what} needs a CUDA device, and torch finds none"
    elif torch.version.cuda is not None and torch.cuda.get_device_capability() < least:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        yield f"{what} needs compute capability {'.'.join(map(str, least))}, this device has {found}"


def _wanted(request: QuantizerRequest) -> Wanted:
    variant = request.variant or DEFAULT
    given = dict(request.options)
    device = request.device.partition(":")[0]
    if variant not in VARIANTS:
        known = {name for forms in VARIANTS.values() for form in forms for name in form.options} | set(COMMON)
        reasons = [f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}"]
        reasons += [f"option {name!r} is unknown" for name in given if name not in known]
        return Wanted(DEFAULT, default_form(DEFAULT, device), {}, reasons=reasons)
    reasons = []
    form, packings = default_form(variant, device), [form.packing for form in VARIANTS[variant]]
    if (packing := given.pop("packing", form.packing)) != form.packing:
        if packing in packings:
            form = VARIANTS[variant][packings.index(packing)]
        else:
            reasons.append(_unfit("packing", packing, tuple(p for p in packings if p is not None)))
    if type(head := given.pop("head", False)) is not bool:
        reasons.append(_unfit("head", head, (False, True)))
    options = {name: option.values[0] for name, option in form.options.items()}
    for name, value in given.items():
        if name not in options:
            there = ", ".join([*options, *COMMON])
            reasons.append(f"option {name!r} is unknown to {variant}; there are {there}")
        elif not any(type(value) is type(known) and value == known for known in form.options[name].values):
            reasons.append(_unfit(name, value, form.options[name].values))
        else:
            options[name] = value
    return Wanted(variant, form, options, bool(head), reasons)


def _unfit(name: str, value: Any, values: tuple[Any, ...]) -> str:
    if not values:
        return f"{name}={value!r} makes no sense; there is one way to keep these weights"
    return f"{name}={value!r} makes no sense; it may be {', '.join(map(repr, values))}"
