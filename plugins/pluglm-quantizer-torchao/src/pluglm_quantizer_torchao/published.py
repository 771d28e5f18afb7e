"""The `quantization_config` beside packed weights: written as Transformers writes it, read back strictly.

Nothing of the file is called or imported: a setting is found by comparing its text with what each value that an option
may have would be written as. Source: `TorchAoConfig.to_dict` of Transformers 5.23, `torchao.core.config` of 0.18.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pluglm import ConfigError
from pluglm.contracts import QuantizerRequest
from pluglm_quantizer_torchao.forms import VARIANTS, Form
from pluglm_quantizer_torchao.library import find
from pluglm_quantizer_torchao.settings import Settings, misplaced, refused

#: Keys of Transformers that must be off: embeddings are not linear layers here.
EMBEDDINGS = ("include_input_output_embeddings", "untie_embedding_weights")
KEYS = {"quant_method", "quant_type", "modules_to_not_convert", "packing", "dtype", "biased", *EMBEDDINGS}
#: Fields of torchao's configs that change no number.
IGNORED = {"set_inductor_config"}


def written(settings: Settings) -> dict[str, Any]:
    """What to write beside packed weights."""
    return {
        "quant_method": "torchao", "quant_type": {"default": _encoded(settings)},
        "modules_to_not_convert": None, "include_input_output_embeddings": False, "untie_embedding_weights": False,
    }  # fmt: skip


def read(request: QuantizerRequest) -> Settings:
    """The settings of a packed file.

    Raises: ConfigError for a config that cannot be read; UnsupportedRequestError if such layers do not run here.
    """
    config = request.config
    assert config is not None
    said = [*([] if request.variant is None else [f"variant {request.variant!r}"])]
    said += [f"option {name!r}" for name, _ in request.options]
    if said:
        raise refused(*(f"{what} is given for weights that are packed already" for what in said))
    for key in config:
        if key not in KEYS:
            raise unreadable(f"it says {key}={config[key]!r}, which is not known here")
    for key in EMBEDDINGS:
        if config.get(key):
            raise unreadable(f"it says {key}={config[key]!r}, and packed embeddings are not read here")
    device = request.device.partition(":")[0]
    settings = _legacy(config, request) or _parsed(config.get("quant_type"), request)
    if reasons := list(misplaced(settings.variant, settings.form, device, request.dtype)):
        raise refused(*reasons)
    return settings


def unreadable(why: str, quant_type: Any = None) -> ConfigError:
    """The error of a config."""
    what = "this checkpoint's quantization_config cannot be read"
    if quant_type is not None:
        what = f"this checkpoint is packed by torchao as {quant_type!r}"
    return ConfigError(
        f"{what}.", why=f"{why}.", key="quantization_config",
        fix="Load the plain weights and pack them with quantizer='torchao:int8' or another of its variants.",
    )  # fmt: skip


def _legacy(config: Mapping[str, Any], request: QuantizerRequest) -> Settings | None:
    """What this package wrote before it had more than one type."""
    if config.get("packing") != "pluglm":
        return None
    if config.get("quant_type") != "int8_weight_only":
        raise unreadable("packing 'pluglm' was only ever used with int8_weight_only", config.get("quant_type"))
    return Settings("int8", VARIANTS["int8"][0], {"group_size": "row"}, request.device, request.dtype,
                    prefix="", reads=True)  # fmt: skip


def _parsed(quant_type: Any, request: QuantizerRequest) -> Settings:
    entry = quant_type.get("default") if isinstance(quant_type, Mapping) and set(quant_type) == {"default"} else None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("_data"), Mapping):
        why = 'quant_type is {"default": a config of torchao 0.18} here; texts such as int8_weight_only are of earlier '
        raise unreadable(why + "releases, whose tensors were pickled", quant_type if quant_type is not None else "?")
    forms = [(name, form) for name, forms in VARIANTS.items() for form in forms if form.type == entry.get("_type")]
    if not forms:
        names = ", ".join(sorted({form.type for forms in VARIANTS.values() for form in forms}))
        raise unreadable(f"of torchao's configs these are read: {names}", entry.get("_type"))
    tried = [_matched(name, form, entry, request) for name, form in forms]
    settings, differences = min(tried, key=lambda found: len(found[1]))
    if differences:
        raise unreadable("; ".join(differences), entry["_type"])
    if not settings.form.kept:
        raise unreadable(f"its packing {settings.form.packing!r} means other things on other machines", entry["_type"])
    return dataclasses.replace(settings, reads=True)


def _matched(
    variant: str, form: Form, entry: Mapping[str, Any], request: QuantizerRequest
) -> tuple[Settings, list[str]]:
    """This form with the options that come nearest to an entry, and where they still differ."""
    options = {name: option.values[0] for name, option in form.options.items()}
    settings = Settings(variant, form, options, request.device, request.dtype)
    for name, option in form.options.items():
        for value in option.values if option.field in entry["_data"] else ():
            candidate = dataclasses.replace(settings, options={**settings.options, name: value})
            try:
                found = _encoded(candidate)["_data"][option.field]
            except ValueError:
                continue
            if found == entry["_data"][option.field]:
                settings = candidate
                break
    return settings, list(_differences(_encoded(settings), entry))


def _differences(ours: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[str]:
    if entry.get("_version", ours["_version"]) != ours["_version"]:
        yield f"it is version {entry['_version']} of that config, version {ours['_version']} is read here"
    for key, value in entry["_data"].items():
        if key in IGNORED:
            continue
        if key not in ours["_data"]:
            yield f"it says {key}={value!r}, which torchao 0.18 does not know"
        elif ours["_data"][key] != value:
            yield f"it says {key}={value!r}, which is not read here"


def _encoded(settings: Settings) -> dict[str, Any]:
    entry: dict[str, Any] = find("core.config:config_to_dict")(settings.config())
    return entry
