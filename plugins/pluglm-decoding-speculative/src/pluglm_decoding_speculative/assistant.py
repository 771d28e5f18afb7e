"""The smaller model that guesses: what it must be, and how one that is named is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pluglm_decoding_blocks.failures import refused

from pluglm.contracts import DecodingRequest
from pluglm.errors import InputError, UnsupportedRequestError


@dataclass(frozen=True)
class Assistant:
    """A model that guesses.

    Attributes:
        model: called as `pluglm.forward.CausalLM`. vocab_size: of it. max_seq_len: its context; None: unbounded.
        decode: its tokenizer's token ids -> text; None: not known.
    """

    model: Any
    vocab_size: int
    max_seq_len: int | None
    decode: Callable[[Sequence[int]], str] | None = None


def read_assistant(given: Any, request: DecodingRequest) -> Assistant:
    """What a caller passed as the assistant of the model that `request` describes.

    Args:
        given: a LanguageModel, a CausalLM, or an Assistant. Of a CausalLM nobody knows the tokenizer; then equal sizes
            of the vocabularies are all that is checked.
    Raises: InputError for anything else; UnsupportedRequestError for another vocabulary.
    """
    from pluglm.forward import CausalLM
    from pluglm.lm import LanguageModel

    assistant: Assistant | None = given if isinstance(given, Assistant) else None
    model, decode = given, None
    if isinstance(given, LanguageModel):
        model, decode = given.model, given.tokenizer.decode if given.tokenizer is not None else None
    if isinstance(model, CausalLM):
        description = model.description
        assistant = Assistant(model, description.vocab_size, description.max_seq_len, decode)
    if assistant is None:
        raise InputError(
            f"assistant_model is a {type(model).__name__}, not a decoder-only model of pluglm.",
            fix='Pass what pluglm.load returns, or name a model: options={"decoding": {"assistant": …}}.',
            argument="assistant_model",
        )  # fmt: skip
    if reason := _other_vocabulary(assistant, request):
        raise refused(
            "assisted",
            (reason,),
            "Use an assistant with the same tokenizer, of the same family; guesses are token ids.",
        )
    return assistant


def load_assistant(name: Any, request: DecodingRequest) -> Assistant:
    """Load a model by name or folder, on the device of the model it helps.

    Raises: UnsupportedRequestError if it is no name or has another vocabulary; what `pluglm.load` raises.
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
