"""The files of one tokenizer: what each says, and copying them as they were."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pluglm.checkpoint.strict_json import JsonError, parse_object
from pluglm.errors import ConfigError, SaveError, UnsupportedRequestError

TOKENIZER, CONFIG, MAP, TEMPLATE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_LIMITS = {TOKENIZER: 200_000_000, CONFIG: 20_000_000, MAP: 5_000_000, TEMPLATE: 1_000_000}
#: Classes for which the reference library takes tokenizer.json's word on the ends of a text, whatever the flags say.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
#: Names under which a file may say which token plays a part.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What was read.

    Attributes:
        tokenizer: bytes of tokenizer.json. roles: "eos_token" -> the token's text. extra_special: further ones.
        templates: chat templates by name; the usual one is "default".
        add_bos, add_eos: what the config says of the ends of a text; None: nothing, tokenizer.json decides.
        digests: of each file that was read, for `copy_to`.
    """

    folder: Path
    tokenizer: bytes
    roles: Mapping[str, str]
    extra_special: tuple[str, ...]
    templates: Mapping[str, str]
    add_bos: bool | None
    add_eos: bool | None
    digests: Mapping[str, str] = field(default_factory=dict)

    def copy_to(self, folder: Path) -> None:
        """Write the files, unchanged. Raises SaveError if one is no longer what was read."""
        if folder.resolve() == self.folder.resolve():
            return
        contents = {}
        for name, digest in self.digests.items():
            path = self.folder / name
            try:
                contents[name] = path.read_bytes()
            except OSError as e:
                raise SaveError(
                    f'"{path}" can no longer be read, so the tokenizer was not saved.', why=str(e),
                    fix="Put the model's folder back, or load it again.", path=str(path),
                ) from e  # fmt: skip
            if _digest(contents[name]) != digest:
                raise SaveError(f'"{path}" changed since it was loaded, so the tokenizer was not saved.',
                                fix="Load the model again, then save.", path=str(path))  # fmt: skip
        try:
            for name, raw in contents.items():
                temporary = folder / f".{name}.{os.getpid()}"
                temporary.write_bytes(raw)
                temporary.replace(folder / name)
        except OSError as e:
            raise SaveError(
                f'the tokenizer could not be written to "{folder}".', why=str(e),
                fix="Check that the folder exists and may be written.", path=str(folder),
            ) from e  # fmt: skip


def read_files(folder: Path) -> TokenizerFiles:
    """Read the folder's tokenizer files.

    Raises: UnsupportedRequestError without a tokenizer.json (another provider may read what is there), ConfigError for
    files that are damaged or contradict themselves.
    """
    raw = {name: content for name in _LIMITS if (content := _read(folder / name, _LIMITS[name])) is not None}
    if TOKENIZER not in raw:
        reason = f'"{folder}" has no {TOKENIZER}'
        raise UnsupportedRequestError(
            reason + ".", fix="Convert the tokenizer, or install a plugin that reads the files that are there.",
            reasons=(reason,),
        )  # fmt: skip
    config, special = (_object(folder / name, raw.get(name)) for name in (CONFIG, MAP))
    roles = {role: text for role in ROLES for source in (special, config) if (text := _token(source, role, folder))}
    extra = [*_tokens(special.get("additional_special_tokens")), *_tokens(config.get("additional_special_tokens"))]
    extra += _declared(config.get("added_tokens_decoder"))
    flags = [_flag(config, key, folder) for key in ("add_bos_token", "add_eos_token")]
    if config.get("tokenizer_class") in _GENERIC:
        flags = [None, None]
    return TokenizerFiles(
        folder, raw[TOKENIZER], roles, tuple(dict.fromkeys(extra)), _templates(config, raw.get(TEMPLATE), folder),
        flags[0], flags[1],
        {name: _digest(content) for name, content in raw.items()},
    )  # fmt: skip


def _read(path: Path, limit: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConfigError(f'"{path}" cannot be read.', why=str(e), fix="Check the file and its permissions.",
                          path=str(path), key=None) from e  # fmt: skip
    if len(raw) > limit:
        raise ConfigError(
            f'"{path}" is larger than {limit:,} bytes.', fix="Such a file does not belong to a tokenizer.",
            path=str(path), key=None,
        )  # fmt: skip
    return raw


def _object(path: Path, raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        return parse_object(raw)
    except JsonError as e:
        raise ConfigError(
            f'"{path}" is not a JSON object as expected.', why=f"{e}.",
            fix="Repair the file, or download the model again.", path=str(path), key=None,
        ) from e  # fmt: skip


def _token(source: Mapping[str, Any], role: str, folder: Path) -> str | None:
    """A token written as "</s>" or as {"content": "</s>", …}."""
    value = source.get(role)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise wrong(folder, CONFIG, role, f"{role} is {value!r}, which names no token")
    return text or None


def _tokens(value: Any) -> list[str]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    texts = [item.get("content") if isinstance(item, dict) else item for item in items]
    return [text for text in texts if isinstance(text, str) and text]


def _declared(decoder: Any) -> list[str]:
    """Tokens that `added_tokens_decoder` marks as special."""
    entries = decoder.values() if isinstance(decoder, dict) else ()
    return _tokens([entry for entry in entries if isinstance(entry, dict) and entry.get("special") is True])


def _templates(config: Mapping[str, Any], file: bytes | None, folder: Path) -> dict[str, str]:
    """Chat templates by name. A chat_template.jinja goes before the config's."""
    value = config.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        for entry in value:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
                raise wrong(folder, CONFIG, "chat_template", "an entry of the list lacks a name or a template")
            found[entry["name"]] = entry["template"]
    elif value is not None:
        raise wrong(folder, CONFIG, "chat_template", f"it is a {type(value).__name__}, neither text nor a list")
    if file is not None:
        try:
            found["default"] = file.decode("utf-8")
        except UnicodeDecodeError as e:
            raise wrong(folder, TEMPLATE, "chat_template", f"byte {e.start} is not UTF-8") from e
    return found


def _flag(config: Mapping[str, Any], key: str, folder: Path) -> bool | None:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise wrong(folder, CONFIG, key, f"{key} is {value!r}, neither true nor false")
    return value


def wrong(folder: Path, name: str, key: str | None, why: str) -> ConfigError:
    """The error for a file that says what cannot be honoured."""
    return ConfigError(
        f'"{folder / name}" cannot be used.', why=f"{why}.", fix="Repair the file, or download the model again.",
        path=str(folder / name), key=key,
    )  # fmt: skip


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
