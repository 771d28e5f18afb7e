"""The arguments of `from_pretrained`: which `pluglm.load` is told, which are always so, which are refused and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm_hf.devices import device_of, dtype_of
from pluglm_hf.quantization import read_quantization
from pluglm_hf.refusals import refuse_said, unknown, unsupported

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel
    from pluglm.loader import Loader

#: attn_implementation -> the attention provider. Another name is taken as a provider's own.
ATTENTION: Mapping[str, str] = {
    "eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash:2", "flash_attention_3": "flash:3",
    "flex_attention": "flex",
}  # fmt: skip
#: Arguments of the look-up, which every `from_pretrained` takes.
LOOKUP = ("revision", "token", "local_files_only", "cache_dir", "subfolder", "force_download", "use_auth_token")
#: Arguments that ask for what is always so here.
ALWAYS = ("low_cpu_mem_usage", "use_safetensors", "weights_only", "return_dict")
#: Special tokens that old code sets while loading; they go to the model's generation settings.
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "use_cache")
LOADING = (
    *LOOKUP, *ALWAYS, *TOKENS, "dtype", "torch_dtype", "device_map", "attn_implementation", "use_flash_attention_2",
    "quantization_config", "load_in_4bit", "load_in_8bit", "config", "generation_config",
)  # fmt: skip
_ONE_DEVICE = "a model here is on one device."
#: Arguments that are known and cannot be honoured: why, and what to do.
REFUSED: Mapping[str, tuple[str, str]] = {
    "trust_remote_code": (
        "no code is taken from a model's files; architectures, and decoding methods of the Hub, are installed plugins.",
        (
            "Leave it out. For a decoding method run `pluglm vendor hub:org/name@<commit>`, install the wheel, and "
            "pass its name as custom_generate; for an architecture install the package that provides its model_type."
        ),
    ),
    "code_revision": ("no code is taken from a model's files.", "Leave it out."),
    "max_memory": (_ONE_DEVICE, "Leave it out, or choose a smaller dtype or a quantizer."),
    "offload_folder": (_ONE_DEVICE, "Leave it out; weights are mapped from their files."),
    "offload_state_dict": (_ONE_DEVICE, "Leave it out; weights are mapped from their files."),
    "offload_buffers": (_ONE_DEVICE, "Leave it out."),
    "tp_plan": (_ONE_DEVICE, "Leave it out."),
    "tp_size": (_ONE_DEVICE, "Leave it out."),
    "device_mesh": (_ONE_DEVICE, "Leave it out."),
    "distributed_config": (_ONE_DEVICE, "Leave it out."),
    "variant": ("one set of weights is read, model.safetensors or what its index names.", "Rename the files."),
    "gguf_file": (
        "such a file is another format.",
        'Use pluglm.load(file, format="gguf") with a plugin that reads it.',
    ),
    "state_dict": ("weights come from the files.", "Save them with safetensors, and load the folder."),
    "ignore_mismatched_sizes": ("a weight of the wrong shape is an error.", "Correct the checkpoint."),
    "output_loading_info": ("every key is accounted for, or loading fails.", "Leave it out."),
    "adapter_name": ("adapters are no part of a checkpoint here.", "Merge the adapter into the weights first."),
    "adapter_kwargs": ("adapters are no part of a checkpoint here.", "Merge the adapter into the weights first."),
    "key_mapping": ("the architecture's plugin maps the names of weights.", "Leave it out."),
    "use_kernels": ("kernels are installed plugins, which the plan chooses.", "Leave it out."),
    "kernel_config": ("kernels are installed plugins, which the plan chooses.", "Leave it out."),
    "experts_implementation": ("the plan chooses the kernels.", "Leave it out."),
    "fusion_config": ("the executor decides what is fused.", "Leave it out, or load with pluglm.load(executor=…)."),
}


@dataclass(frozen=True)
class Wishes:
    """What a call of `from_pretrained` asks for.

    Attributes:
        name: of the model. load: arguments of `pluglm.load`. generation: fields to set, or a whole configuration.
        config: a configuration that the caller passed, which must be the model's own.
    """

    name: str
    load: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    generation_config: Any = None
    config: Any = None

    def language_model(self, **changed: Any) -> LanguageModel:
        """Load it, with some arguments changed."""
        import pluglm

        return pluglm.load(self.name, **{**self.load, **changed})


def read_wishes(name: str | Path, arguments: Mapping[str, Any]) -> Wishes:
    """Sort the arguments of a model's `from_pretrained`.

    Raises: InputError for what nobody knows or makes no sense, UnsupportedRequestError for what cannot be honoured.
    """
    refuse_said(REFUSED, arguments)
    for argument in arguments:
        if argument not in LOADING and argument not in REFUSED:
            raise unknown("from_pretrained", argument, LOADING)
    for argument in ALWAYS:
        if arguments.get(argument) is False:
            raise unsupported(argument, False, "weights are mapped from safetensors files, and outputs have names.",
                              "Leave it out.")  # fmt: skip
    said = dict(arguments)
    load = _lookup(name, said)
    load["device"] = device_of(said.get("device_map"))
    load["dtype"] = dtype_of(said.get("dtype"), said.get("torch_dtype"))
    load["attention"] = attention_of(said.get("attn_implementation"), said.get("use_flash_attention_2"))
    packing = read_quantization(
        said.get("quantization_config"), in_4bit=said.get("load_in_4bit"), in_8bit=said.get("load_in_8bit")
    )
    if packing is not None:
        _check_installed(packing.quantizer)
        load.update(quantizer=packing.quantizer, quantizer_skip=packing.skip)
        if packing.options:
            load["options"] = {"quantizer": packing.options}
    generation = {k: said[k] for k in TOKENS if said.get(k) is not None}
    return Wishes(str(name), load, generation, said.get("generation_config"), said.get("config"))


def find_folder(name: str | Path, arguments: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a model's files, and the arguments that are not about the look-up."""
    from pluglm.manager import Manager
    from pluglm.request import LoadRequest
    from pluglm.sources import find_model

    refuse_said(REFUSED, arguments)
    rest = {k: v for k, v in arguments.items() if k not in LOOKUP and k not in REFUSED}
    return find_model(LoadRequest(str(name), **_lookup(name, arguments)), Manager.installed()), rest


def open_model(name: str | Path, arguments: Mapping[str, Any]) -> Loader:
    """What is known of a model before its weights are read. Raises for arguments that are not about the look-up."""
    from pluglm.loader import Loader
    from pluglm.manager import Manager
    from pluglm.request import read_request

    refuse_said(REFUSED, arguments)
    for argument in arguments:
        if argument not in LOOKUP and argument not in REFUSED:
            raise unknown("from_pretrained", argument, LOOKUP)
    return Loader(read_request(str(name), {}, {}, **_lookup(name, arguments)), Manager.installed())


def _lookup(name: str | Path, said: Mapping[str, Any]) -> dict[str, Any]:
    token = said.get("token", said.get("use_auth_token"))
    if token is False:
        raise unsupported("token", False, "the client of the Hub uses the token that is stored.",
                          "Unset HF_TOKEN and log out, or pass another token.")  # fmt: skip
    if said.get("subfolder"):
        raise unsupported("subfolder", said["subfolder"], "a model is a folder.", "Pass that folder itself.")
    if said.get("force_download"):
        raise unsupported("force_download", True, "files are kept by their digest.", "Leave it out.")
    if not isinstance(name, str | Path):
        raise InputError(f"{name!r} names no model.", fix="Pass the path of a folder, or org/name of the Hub.",
                         argument="pretrained_model_name_or_path")  # fmt: skip
    local = Path(name).expanduser().is_dir()
    if said.get("cache_dir") is not None and not local:
        raise unsupported("cache_dir", said["cache_dir"], "one place of this machine holds what comes from the Hub.",
                          "Set the environment variable HF_HUB_CACHE.")  # fmt: skip
    found: dict[str, Any] = {"token": token if isinstance(token, str) else None}
    # A folder has no revision, and the reference's own default is no wish.
    found["revision"] = None if local and said.get("revision") == "main" else said.get("revision")
    found["offline"] = True if said.get("local_files_only") else None
    return found


def attention_of(implementation: Any, flash_2: Any = None) -> str:
    """The attention provider that `attn_implementation` (or the older `use_flash_attention_2`) names."""
    if flash_2:
        if implementation not in (None, "flash_attention_2"):
            raise InputError(f"use_flash_attention_2=True contradicts attn_implementation={implementation!r}.",
                             fix="Leave the older one out.", argument="use_flash_attention_2")  # fmt: skip
        implementation = "flash_attention_2"
    if isinstance(implementation, Mapping):
        if set(implementation) - {""}:
            raise unsupported("attn_implementation", dict(implementation), "a model here has no parts by that name.",
                              "Pass one name.")  # fmt: skip
        implementation = implementation.get("")
    if implementation is None:
        return "auto"
    if not isinstance(implementation, str):
        raise InputError(f"attn_implementation={implementation!r} is no name.",
                         fix=f"Pass one of {', '.join(ATTENTION)}.", argument="attn_implementation")  # fmt: skip
    if implementation in ATTENTION:
        return ATTENTION[implementation]
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.:-]*(/[a-z0-9_.:-]+)?", implementation) or "/" in implementation:
        raise unsupported(
            "attn_implementation", implementation, "kernels are not fetched from the Hub while a model is loaded.",
            f"Pass one of {', '.join(ATTENTION)}, or the name of an installed attention provider.",
        )  # fmt: skip
    return implementation


def _check_installed(quantizer: str) -> None:
    """Raise the error that says what would honour a quantization, before anything is read."""
    from pluglm.manager import Manager

    name = quantizer.partition(":")[0]
    installed = sorted({p.name for p in Manager.installed().registry.of("quantizer")})
    if name not in installed:
        raise unsupported(
            "quantization_config", quantizer, f"no quantizer {name!r} is installed; there is "
            f"{', '.join(installed) or 'none'}.",
            f'Install a plugin that provides it (entry-point group "pluglm.quantizers", such as '
            f"pluglm-quantizer-{name}), or leave quantization_config out.",
        )  # fmt: skip
