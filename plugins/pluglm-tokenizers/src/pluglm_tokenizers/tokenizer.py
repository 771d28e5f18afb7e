"""Text <-> ids through the `tokenizers` library, with control tokens only where they were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pluglm.contracts import TokenizerRequest
from pluglm.errors import InputError
from pluglm_tokenizers.chat import ChatTemplates
from pluglm_tokenizers.engine import Engine
from pluglm_tokenizers.files import CONFIG, TOKENIZER, read_files, wrong
from pluglm_tokenizers.spans import ControlTexts, Escaper


class JsonTokenizer:
    """The tokenizer of one folder. Safe to share between threads.

    Attributes:
        vocab_size: one more than the largest id. special_ids: ids of all control tokens.
        bos_token_id, eos_token_id, pad_token_id: as the files say; None: they do not.
        chat_template: the usual template's source, or None.

    Keys of tokenizer_config.json that are left alone on purpose: `model_max_length` (the model's own limit counts),
    `clean_up_tokenization_spaces` (decoded text would no longer be what was encoded), `padding_side` and
    `truncation_side` (the core pads; nothing is truncated), `tokenizer_class` (tokenizer.json says all of it).
    """

    def __init__(self, request: TokenizerRequest) -> None:
        files = read_files(Path(request.folder))
        self._files = files
        self._engine = Engine(files)
        self.vocab_size: int = self._engine.vocab_size
        if self.vocab_size > request.vocab_size:
            raise wrong(
                files.folder, TOKENIZER, None,
                f"its ids reach {self.vocab_size - 1}, the model's embedding has {request.vocab_size} rows",
            )  # fmt: skip
        self.special_ids: frozenset[int] = self._engine.special_ids
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._role(role) for role in ("bos_token", "eos_token", "pad_token")
        )
        self._prefix, self._suffix = self._ends()
        self.chat_template: str | None = files.templates.get("default")
        self._bytes: tuple[bytes | None, ...] | None = None
        self._control = ControlTexts(self._engine.special_texts)
        self._chat = ChatTemplates(files.templates, files.roles, str(files.folder))

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text. See `pluglm.contracts.Tokenizer`.

        With `parse_special` False no control token comes out of `text`, whatever it holds: such strings are ordinary
        characters.
        """
        if not isinstance(text, str):
            raise InputError(f"text is a {type(text).__name__}.", fix="Pass a str.", argument="text")
        body = self._engine.ids(text, parse_special=parse_special)
        return [*self._prefix, *body, *self._suffix] if add_special_tokens else body

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids that have no token (rows that pad the embedding) have no text."""
        return self._engine.text(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> Sequence[bytes | None]:
        """What each id adds to a text. See `pluglm.contracts.Tokenizer`; `token_bytes.py` says when it is refused."""
        if self._bytes is None:  # made twice if two threads ask at once, and the same
            self._bytes = self._engine.token_bytes()
        return self._bytes

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a chat. See `pluglm.contracts.Tokenizer`.

        Control tokens come from the template alone: the same strings inside messages and variables are ordinary
        characters. A text without such strings has the ids of the rendered template as a whole.

        Args:
            **variables: for the template (`tools`, `documents`, `enable_thinking` …): plain data.
        """
        escaper = Escaper(self._control, (messages, variables, *self._files.templates.values()))
        rendered = self._chat.render(
            escaper.escaped(list(messages)), {k: escaper.escaped(v) for k, v in variables.items()},
            add_generation_prompt=add_generation_prompt, plain_json=escaper.repaired,
        )  # fmt: skip
        ids: list[int] = []
        for piece in escaper.pieces(rendered):
            ids += self._engine.ids(piece, parse_special=True)
        return ids

    def save(self, folder: Path) -> None:
        """Copy the files that were read. Raises SaveError if they changed since."""
        self._files.copy_to(Path(folder))

    def _role(self, role: str) -> int | None:
        text = self._files.roles.get(role)
        if text is None:
            return None
        token_id = self._engine.id_of(text)
        if token_id is None:
            raise wrong(self._files.folder, CONFIG, role, f"{role} is {text!r}, which {TOKENIZER} does not hold")
        return token_id

    def _ends(self) -> tuple[list[int], list[int]]:
        """What stands before and after a text: the post-processor's word, unless the config's flags say otherwise."""
        prefix, suffix = self._engine.ends()
        if self._files.add_bos is not None:
            prefix = self._flagged("bos", self._files.add_bos, self.bos_token_id)
        if self._files.add_eos is not None:
            suffix = self._flagged("eos", self._files.add_eos, self.eos_token_id)
        return prefix, suffix

    def _flagged(self, role: str, wanted: bool, token_id: int | None) -> list[int]:
        if wanted and token_id is None:
            raise wrong(self._files.folder, CONFIG, f"add_{role}_token", f"it adds a {role} token and names none")
        return [token_id] if wanted and token_id is not None else []
