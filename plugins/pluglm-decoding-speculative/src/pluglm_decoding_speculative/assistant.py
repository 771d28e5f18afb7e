"""The smaller model that guesses: what it must be, and how one that is named is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pluglm_decoding_blocks.failures import refused

from pluglm.contracts import DecodingRequest
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_decoding_speculative.spelling import Spelling


@dataclass(frozen=True)
class Assistant:
    """A model that guesses.

    Attributes:
        model: called as `pluglm.forward.CausalLM`. vocab_size: of it. max_seq_len: its context; None: unbounded.
        decode: its tokenizer's token ids -> text; None: not known.
        spelling: its tokenizer, for guesses that are spelt anew; None: not known. start: ids that its texts begin with.
            ends: ids that have no text: a guess ends before one.
        translates: its token ids are not the model's.
    """

    model: Any
    vocab_size: int
    max_seq_len: int | None
    decode: Callable[[Sequence[int]], str] | None = None
    spelling: Spelling | None = None
    start: tuple[int, ...] = ()
    ends: frozenset[int] = frozenset()
    translates: bool = False


def read_assistant(given: Any, request: DecodingRequest) -> Assistant:
    """What a caller passed as the assistant of the model that `request` describes.

    Args:
        given: a LanguageModel, a CausalLM, or an Assistant. Of a CausalLM nobody knows the tokenizer; then equal sizes
            of the vocabularies are all that is checked.
    Raises: InputError for anything else; UnsupportedRequestError for another vocabulary of which not both tokenizers
        are known.
    """
    assistant = _described(given)
    reason = _other_vocabulary(assistant, request)
    if reason is None:
        return assistant
    if assistant.spelling is not None and request.decode is not None and request.encode is not None:
        return dataclasses.replace(assistant, translates=True)
    whose = "assistant" if assistant.spelling is None else "model"
    raise refused(
        "assisted",
        (f"{reason}, and the tokenizer of the {whose} is not known, so its text cannot be spelt anew",),
        "Pass the assistant as pluglm.load returns it, with its tokenizer; or use one with the same tokenizer.",
    )


def _described(given: Any) -> Assistant:
    from pluglm.forward import CausalLM
    from pluglm.lm import LanguageModel

    if isinstance(given, Assistant):
        return given
    model = given.model if isinstance(given, LanguageModel) else given
    if not isinstance(model, CausalLM):
        raise InputError(
            f"assistant_model is a {type(model).__name__}, not a decoder-only model of pluglm.",
            fix='Pass what pluglm.load returns, or name a model: options={"decoding": {"assistant": …}}.',
            argument="assistant_model",
        )  # fmt: skip
    known: dict[str, Any] = {}
    if isinstance(given, LanguageModel) and given.tokenizer is not None:
        t = given.tokenizer
        ends = t.special_ids | frozenset(given.generation.eos_token_id or ())
        known = {
            "decode": t.decode,
            "spelling": Spelling(t.decode, partial(t.encode, add_special_tokens=False)),
            "start": tuple(token for token in t.encode("") if token == t.bos_token_id and token != t.eos_token_id),
            "ends": ends,
        }
    return Assistant(model, model.description.vocab_size, model.description.max_seq_len, **known)


def load_assistant(name: Any, request: DecodingRequest) -> Assistant:
    """Load a model by name or folder, on the device of the model it helps.

    Raises: UnsupportedRequestError if it is no name, or as `read_assistant`; what `pluglm.load` raises.
    """
    import pluglm

    if not isinstance(name, str) or not name:
        raise refused(
            "assisted", (f"option 'assistant' is {name!r}, not the name or folder of a model",),
            "Pass a loaded model with each call instead: assistant_model=….",
        )  # fmt: skip
    return read_assistant(pluglm.load(name, device=request.device), request)


def _other_vocabulary(assistant: Assistant, request: DecodingRequest) -> str | None:
    """Why the token ids of the two do not mean the same; None: they do, as far as is known."""
    if assistant.vocab_size != request.vocab_size:
        return f"the assistant has {assistant.vocab_size} token ids, the model {request.vocab_size}"
    if assistant.decode is None or request.decode is None:
        return None
    for token in range(request.vocab_size):
        theirs, ours = assistant.decode([token]), request.decode([token])
        if theirs != ours:
            return f"token id {token} is {theirs!r} to the assistant and {ours!r} to the model"
    return None


def check_rollback(cache: Any, whose: str, strategy: str) -> None:
    """Raise UnsupportedRequestError if a cache cannot take back tokens."""
    if "rollback" not in cache.operations:
        reason = f"the cache of the {whose} ({cache.layout}) has no rollback: a guess that fails cannot be taken back"
        error: UnsupportedRequestError = refused(
            strategy, (reason,), "Name another strategy; models with recurrent states cannot be used so."
        )
        raise error
