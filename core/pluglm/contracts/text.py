"""Text and files: tokenizers, and where checkpoints come from and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


class Message(TypedDict):
    """One turn of a chat. Templates may know further keys."""

    role: str
    content: str


@dataclass(frozen=True)
class TokenizerRequest:
    """What the planner asks a tokenizer provider to build.

    Attributes:
        folder: holds the model's files (tokenizer.json, tokenizer_config.json, chat_template.jinja …).
        vocab_size: rows of the model's embedding; a tokenizer with more ids is refused.
    """

    folder: Path
    vocab_size: int


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    #: Ids that stand for no text of the user's.
    special_ids: frozenset[int]
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: what the tokenizer's file says belongs at the ends.
            parse_special: whether "<|eos|>" in the text means the token; by default it is ordinary characters.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not yet whole characters come out as U+FFFD."""
        ...

    def token_bytes(self) -> Sequence[bytes | None]:
        """What each id adds to the text of the ids before it, in UTF-8; a token may end inside a character.

        Joined, the bytes of a text's ids are the text, with one exception: vocabularies with "▁" for a space may begin
        it with a space that `decode` leaves out. Made once and kept: it may be asked for often. Since API 1.1; what
        needs it is refused with a tokenizer that lacks it.

        Returns: [vocab_size]; None: a control token, or an id without a token.
        Raises: UnsupportedRequestError if what a token adds depends on its neighbours.
        """
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a chat, rendered by the model's own template in a sandbox.

        Raises: InputError if the model has no template, or if the template refuses the messages.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the files that this tokenizer was made from."""
        ...


@runtime_checkable
class Checkpoint(Protocol):
    """A checkpoint opened for reading: its JSON files, and tensors by name without copying."""

    #: The folder that holds the files; a tokenizer reads its own from there.
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    #: Changes when the weights or the config do.
    fingerprint: str

    @property
    def tensors(self) -> Mapping[str, Any]:
        """name -> an object with `.shape` (tuple) and `.dtype` (safetensors name, "BF16")."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, mapped from the file. Writing to it does not change the file."""
        ...

    def file(self, name: str) -> Path | None:
        """A file beside the weights, or None."""
        ...


@dataclass(frozen=True)
class SourceRequest:
    """A model as the user named it, for a source provider. `revision`, `offline`, `token` as in `pluglm.load`."""

    model: str
    revision: str | None = None
    offline: bool | None = None
    token: str | None = None


@runtime_checkable
class Source(Protocol):
    """Finds checkpoints by name. One that needs no name of the model's may offer a default model."""

    name: str

    def resolve(self, request: SourceRequest) -> Path | None:
        """The folder of this model, or None if this source does not know the name."""
        ...
