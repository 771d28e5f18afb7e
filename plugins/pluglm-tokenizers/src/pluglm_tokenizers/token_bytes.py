"""What each token adds to a text, in bytes: the decoder of a tokenizer.json, applied to one token at a time.

That can be done where a text is nothing but its tokens' bytes, one after the other. Byte-level vocabularies (GPT-2) and
those with "▁" for a space (SentencePiece) are so; the latter drop the space before the first word, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pluglm.errors import UnsupportedRequestError

Step = Callable[[str], "str | bytes"]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def token_bytes(decoder: Mapping[str, Any] | None, tokens: Sequence[str | None]) -> tuple[bytes | None, ...]:
    """The bytes of each token; None where the token is None.

    Args:
        decoder: as in tokenizer.json. tokens: by id; None for ids that add no text.
    Raises: UnsupportedRequestError for a decoder that makes a token's text depend on its neighbours.
    """
    steps = _steps(decoder)

    def read(token: str) -> bytes:
        for step in steps:
            made = step(token)
            if isinstance(made, bytes):
                return made
            token = made
        return token.encode()

    return tuple(None if token is None else read(token) for token in tokens)


def _steps(decoder: Mapping[str, Any] | None) -> list[Step]:
    """What is done to a token, in order; a step that gives bytes is the last."""
    if decoder is None:
        raise _depends("it has no decoder, so its tokens are joined by spaces")
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if len(parts) == 1 and parts[0]["type"] == "ByteLevel":
        return [_byte_level]
    steps: list[Step] = []
    fused = False
    for part in parts:
        kind = part["type"]
        if kind == "Metaspace" and not fused:
            steps.append(_replaced(part["replacement"], " "))
        elif kind == "Replace" and "String" in part["pattern"] and (not fused or len(part["pattern"]["String"]) == 1):
            steps.append(_replaced(part["pattern"]["String"], part["content"]))
        elif kind == "ByteFallback" and not fused:
            steps.append(_byte_fallback)
        elif kind == "Fuse":
            fused = True
        # At the start of the whole text: the leading space that the encoder put there.
        elif not (kind == "Strip" and fused and (part["content"], part["start"], part["stop"]) == (" ", 1, 0)):
            raise _depends(f"its decoder has the step {kind}")
    return steps


def _depends(reason: str) -> UnsupportedRequestError:
    reason = f"{reason}; what a token adds to a text depends on its neighbours"
    return UnsupportedRequestError(
        "this tokenizer cannot say which bytes each of its tokens stands for.", why=reason,
        fix="Leave out what needs them (`constraint`, `token_healing`), or use a model with a byte-level or "
        "SentencePiece vocabulary.", reasons=(reason,),
    )  # fmt: skip


def _replaced(old: str, new: str) -> Step:
    return lambda token: token.replace(old, new)


def _byte_fallback(token: str) -> str | bytes:
    """One byte, of a token like "<0xE2>"; anything else is left to the steps behind."""
    found = _BYTE.match(token)
    return bytes([int(found[1], 16)]) if found else token


def _byte_level(token: str) -> bytes:
    """Each character is one byte; a token with other characters (one that was added) is its own text."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _alphabet() -> dict[str, int]:
    """Characters of a byte-level vocabulary: visible Latin-1 stands for itself, the other bytes follow from U+0100 on.

    Source: Radford et al. 2019, `bytes_to_unicode` of the GPT-2 encoder.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()
