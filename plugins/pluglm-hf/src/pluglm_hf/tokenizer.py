"""A tokenizer as code written for transformers uses it, over the provider that pluglm's planner chooses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pluglm.errors import InputError
from pluglm_hf.batch_encoding import BatchEncoding
from pluglm_hf.chats import chat_text, refuse_chat
from pluglm_hf.padding import SIDES, Shape, batch, cut_row, read_limit, read_padding
from pluglm_hf.refusals import unsupported
from pluglm_hf.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from pluglm.contracts.text import Tokenizer

#: What `from_pretrained` may set, apart from the look-up.
SETTINGS = (
    "bos_token", "eos_token", "legacy", "model_max_length", "pad_token", "padding_side", "truncation_side", "use_fast",
)  # fmt: skip
_ROLES = ("bos_token", "eos_token", "pad_token")
#: The reference writes a number of this size where nobody knows a limit.
_ENDLESS = 10**9


def build_tokenizer(folder: Path, vocab_size: int = 2**31) -> Tokenizer:
    """The tokenizer of a folder. vocab_size: rows of the model's embedding; by default nobody knows.

    Raises: PluginNotFoundError, UnsupportedRequestError, ConfigError.
    """
    from pluglm.build import build
    from pluglm.contracts.text import TokenizerRequest
    from pluglm.manager import Manager
    from pluglm.planner import Demand, Planner, Wanted

    manager = Manager.installed()
    choice = Planner(manager).single("tokenizer", Wanted(), Demand(), "reads tokenizer.json")
    made: Tokenizer = build(manager, choice, "pluglm_build_tokenizer", request=TokenizerRequest(folder, vocab_size))
    return made


class PreTrainedTokenizer:
    """Text <-> ids, with padding. Control tokens inside a text are parsed, as in the reference; not those of messages.

    Args:
        tokenizer: pluglm's. name: as the user named it. **settings: see `SETTINGS`.

    Attributes:
        bos_token, eos_token, pad_token: texts, each with its `…_id`; a pad token may be set to one that exists.
        padding_side, truncation_side: "left" or "right". model_max_length: tokens a row may have, or None.
    """

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True

    def __init__(self, tokenizer: Tokenizer, *, folder: Path, name: str = "", **settings: Any) -> None:
        self.backend, self.folder, self.name_or_path = tokenizer, folder, name
        self._ids: dict[str, int | None] = {role: getattr(tokenizer, f"{role}_id") for role in _ROLES}
        said = {**_file_settings(folder), **{k: v for k, v in settings.items() if v is not None}}
        self.padding_side, self.truncation_side = (_side(said, side) for side in ("padding_side", "truncation_side"))
        limit = said.get("model_max_length")
        self.model_max_length: int | None = int(limit) if limit is not None and limit < _ENDLESS else None
        for role in _ROLES:
            if settings.get(role) is not None:
                setattr(self, role, settings[role])

    # Special tokens

    def __getattr__(self, name: str) -> Any:
        role = name.removesuffix("_id")
        if role in _ROLES and "_ids" in self.__dict__:
            token_id = self._ids[role]
            return token_id if name != role or token_id is None else self.convert_ids_to_tokens(token_id)
        raise AttributeError(f"this tokenizer has no {name!r}; the README of pluglm-hf lists what it has")

    def __setattr__(self, name: str, value: Any) -> None:
        role = name.removesuffix("_id")
        if role not in _ROLES:
            super().__setattr__(name, value)
        elif name == role and value is not None:
            self._ids[role] = self._known(value)
        else:
            self._ids[role] = value

    def _known(self, text: str) -> int:
        token_id = self.vocabulary.ids.get(str(text))
        if token_id is None:
            raise InputError(
                f"{text!r} is no token of this tokenizer.",
                why="a new token would need a new row of the model's embedding, which nobody trained.",
                fix="Use one that exists: tokenizer.pad_token = tokenizer.eos_token.", argument="token",
            )  # fmt: skip
        return token_id

    def add_special_tokens(self, special_tokens_dict: Mapping[str, str]) -> int:
        """Give existing tokens a role; returns 0, the number of new ones. Raises InputError for a new one."""
        for role, text in special_tokens_dict.items():
            if role not in _ROLES:
                raise unsupported("add_special_tokens", role, "no other role is read.", f"Pass {', '.join(_ROLES)}.")
            setattr(self, role, text)
        return 0

    def add_tokens(self, *tokens: Any, **arguments: Any) -> NoReturn:
        """Refused."""
        raise unsupported("add_tokens", tokens, "a new token would need a new row of the model's embedding.",
                          "Use the tokens that the model was trained with.")  # fmt: skip

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens that play a part."""
        return list(dict.fromkeys(i for i in self._ids.values() if i is not None))

    @property
    def all_special_tokens(self) -> list[str]:
        """Their texts."""
        return [self.vocabulary.pieces[i] for i in self.all_special_ids]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Role -> text, of the roles that a token has."""
        return {role: getattr(self, role) for role in _ROLES if self._ids[role] is not None}

    # Vocabulary

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Pieces and ids."""
        return read_vocabulary(self.folder)

    @property
    def vocab_size(self) -> int:
        """Pieces, without those that were added later; `len` counts all."""
        return self.vocabulary.base_size

    def __len__(self) -> int:
        return len(self.vocabulary.ids)

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return dict(self.vocabulary.ids)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Ids of pieces; None for what is no piece."""
        if isinstance(tokens, str):
            return self.vocabulary.ids.get(tokens)
        return [self.vocabulary.ids.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Pieces of ids."""
        if isinstance(ids, int):
            return self.vocabulary.pieces.get(ids)
        skipped = self.backend.special_ids if skip_special_tokens else frozenset()
        return [self.vocabulary.pieces.get(int(i)) for i in ids if int(i) not in skipped]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Pieces of a text."""
        pieces: list[str] = self.convert_ids_to_tokens(self.encode(text, add_special_tokens=add_special_tokens))
        return pieces

    # Text -> ids

    def __call__(
        self, text: Any = None, *, add_special_tokens: bool = True, padding: Any = False, truncation: Any = None,
        max_length: int | None = None, pad_to_multiple_of: int | None = None, padding_side: str | None = None,
        return_tensors: str | None = None, return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None, split_special_tokens: bool = False,
    ) -> BatchEncoding:  # fmt: skip
        """Ids and mask of a text, or of a list of texts.

        Args:
            padding: True or "longest", "max_length", False. truncation: cut rows to max_length (or the tokenizer's).
            padding_side: for this call. return_tensors: "pt" or None, lists.
            split_special_tokens: a control token's text is ordinary characters.
        Raises: InputError.
        """
        if return_token_type_ids:
            raise unsupported("return_token_type_ids", True, "no model here reads them.", "Leave it out.")
        single = isinstance(text, str)
        texts = [text] if single else text
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
            raise InputError(f"text is a {type(text).__name__}.", why="pairs and pre-tokenized words are not read.",
                             fix="Pass a text or a list of texts.", argument="text")  # fmt: skip
        shape = self._shape(padding, truncation, max_length, pad_to_multiple_of, padding_side, return_tensors)
        cut = shape.limit if read_limit(truncation, max_length, shape.padding, self.model_max_length)[0] else None
        rows = [self._row(t, add_special_tokens, not split_special_tokens, cut) for t in texts]
        return batch(rows, single, shape, with_mask=return_attention_mask is not False)

    def encode(self, text: str, *, add_special_tokens: bool = True, **arguments: Any) -> Any:
        """Ids of a text, a list; with return_tensors="pt" a tensor [1, T]. arguments: as of a call."""
        return self(text, add_special_tokens=add_special_tokens, **arguments)["input_ids"]

    def pad(
        self, encoded_inputs: Mapping[str, Any], padding: Any = True, max_length: int | None = None,
        pad_to_multiple_of: int | None = None, padding_side: str | None = None, return_tensors: str | None = None,
    ) -> BatchEncoding:  # fmt: skip
        """Rows of ids, padded to one width."""
        rows = [list(map(int, row)) for row in encoded_inputs["input_ids"]]
        shape = self._shape(padding, None, max_length, pad_to_multiple_of, padding_side, return_tensors)
        return batch(rows, False, shape, with_mask=True)

    def _shape(
        self, padding: Any, truncation: Any, max_length: Any, multiple: Any, side: Any, tensors: Any
    ) -> Shape:  # fmt: skip
        if tensors not in (None, "pt"):
            raise unsupported("return_tensors", tensors, "there are torch tensors and lists.", 'Pass "pt" or None.')
        kind = read_padding(padding)
        limit = read_limit(truncation, max_length, kind, self.model_max_length)[1]
        chosen = _side({"padding_side": side}, "padding_side") if side is not None else self.padding_side
        return Shape(self._ids["pad_token"], chosen, self.truncation_side, kind, limit, multiple, tensors == "pt")

    def _row(self, text: str, ends: bool, parse: bool, limit: int | None) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=ends, parse_special=parse)
        if limit is None or len(ids) <= limit:
            return ids
        body = self.backend.encode(text, add_special_tokens=False, parse_special=parse)
        start = next(i for i in range(len(ids) - len(body) + 1) if ids[i : i + len(body)] == body)
        return cut_row(body, (ids[:start], ids[start + len(body) :]), limit, self.truncation_side)

    # Ids -> text

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """Text of ids: a tensor, a list or one id; of a batch [B, T], a list of texts."""
        if clean_up_tokenization_spaces:
            raise unsupported("clean_up_tokenization_spaces", True, "the text would no longer be what was encoded.",
                              "Leave it out.")  # fmt: skip
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, str | bytes | float) or not isinstance(ids, int | Iterable):
            raise InputError(f"token_ids is a {type(ids).__name__}, not ids.", fix="Pass a list of ids, or a tensor.",
                             argument="token_ids")  # fmt: skip
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens) for row in ids]
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:  # fmt: skip
        """Texts of several rows."""
        if not isinstance(sequences, Iterable):
            raise InputError(f"sequences is a {type(sequences).__name__}, not rows of ids.",
                             fix="Pass a list of rows, or a tensor [B, T].", argument="sequences")  # fmt: skip
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    # Chats

    @property
    def chat_template(self) -> str | None:
        """The usual template's source."""
        return self.backend.chat_template

    def apply_chat_template(
        self, conversation: Any, tools: Any = None, documents: Any = None, chat_template: str | None = None,
        add_generation_prompt: bool = False, continue_final_message: bool = False, tokenize: bool = True,
        padding: Any = False, truncation: Any = False, max_length: int | None = None,
        return_tensors: str | None = None, return_dict: bool = True, return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None, **variables: Any,
    ) -> Any:  # fmt: skip
        """A chat, or a list of chats, by the model's own template.

        Args:
            return_dict: ids and mask (what `generate` takes, as tensors); False: the ids alone.
            tokenize: False: the text. **variables: for the template.
        Raises: InputError without a template, and for messages that it refuses.
        """
        refuse_chat(chat_template not in (None, self.chat_template), {
            "continue_final_message": continue_final_message, "tokenizer_kwargs": tokenizer_kwargs,
            "return_assistant_tokens_mask": return_assistant_tokens_mask,
        })  # fmt: skip
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        given = {k: v for k, v in {"tools": tools, "documents": documents, **variables}.items() if v is not None}
        rows = [
            self.backend.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, **given)
            for chat in ([conversation] if single else conversation)
        ]
        if not tokenize:
            texts = [chat_text(self.backend, row) for row in rows]
            return texts[0] if single else texts
        shape = self._shape(padding, truncation, max_length, None, None, return_tensors)
        if truncation:
            assert shape.limit is not None
            rows = [cut_row(row, ([], []), shape.limit, self.truncation_side) for row in rows]
        found = batch(rows, single, shape, with_mask=True)
        return found if return_dict else found["input_ids"]

    def save_pretrained(self, save_directory: str | Path) -> tuple[str, ...]:
        """Write the files; tokens whose role was changed are named in tokenizer_config.json. Returns their paths."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(folder)
        changed = {r: getattr(self, r) for r in _ROLES if self._ids[r] != getattr(self.backend, f"{r}_id")}
        if changed:
            path = folder / "tokenizer_config.json"
            said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            path.write_text(json.dumps({**said, **changed}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        return tuple(str(folder / name) for name in names if (folder / name).is_file())


def _file_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says of padding and cutting; the provider has read the rest."""
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = ("padding_side", "truncation_side", "model_max_length")
    return {name: said[name] for name in names if said.get(name) is not None}


def _side(said: Mapping[str, Any], name: str) -> str:
    side: str = said.get(name, "right")
    if side not in SIDES:
        raise InputError(f"{name}={side!r} makes no sense.", fix='Pass "left" or "right".', argument=name)
    return side
