"""Classifier-free guidance: scores pushed away from what the model says after another, negative prompt.

Source: Sanchez et al. 2023, "Stay on topic with classifier-free guidance", section 2.2; numbers as in transformers 5.23
UnbatchedClassifierFreeGuidanceLogitsProcessor. Padding of either prompt does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pluglm_decoding_blocks.feed import Feed, make_feed
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.settings import Settings
from pluglm_decoding_blocks.source import encoder_source
from pluglm_decoding_blocks.values import number, said
from torch import Tensor

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError

_IDS, _MASK = "negative_prompt_ids", "negative_prompt_attention_mask"


class Guidance:
    """log p of the negative prompt, plus `scale` times what log p of the prompt has more.

    Runs the model on its own stream: each row's negative prompt, then the row's new tokens as they come.

    Args:
        negative: one row a sequence. prompt_length: S of the prompts. feed: of the negative ones.
    """

    def __init__(self, scale: float, negative: Prompt, prompt_length: int, feed: Feed) -> None:
        self._scale, self._negative, self._length, self._feed = scale, negative, prompt_length, feed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V] float32. input_ids: [R, S], one token longer at each call."""
        new = input_ids[:, self._length :]
        if new.shape[1]:
            logits = self._feed.step(torch.cat((self._negative.ids, new), dim=1), None)
        else:
            logits = self._feed.prefill()
        negative = logits.float().log_softmax(-1)
        return self._scale * (scores.log_softmax(-1) - negative) + negative


def make_guidance(
    config: GenerationConfig, model: Any, prompt: Prompt, settings: Settings, limits: Sequence[int],
    model_kwargs: Mapping[str, Any], *, vocab_size: int,
) -> Guidance | None:  # fmt: skip
    """What the guidance fields of a call ask for; None: nothing.

    Args:
        prompt: one row a prompt. limits: new tokens of each.
        model_kwargs: of the call; of these the negative stream is told use_cache alone.
    Raises: InputError for fields that make no sense or do not fit together.
    """
    scale = number(config, "guidance_scale")
    if scale is None or scale == 1:
        for name in (_IDS, _MASK):
            if said(config, name) is not None:
                raise InputError(
                    f"{name} is given, and nothing is guided away from it.", why="guidance_scale is not set, or 1.",
                    fix="Set guidance_scale (1.5 is a common value), or leave it out.", argument=name,
                )  # fmt: skip
        return None
    if encoder_source(model) is not None:
        raise InputError(
            "guidance_scale cannot be honoured for an encoder-decoder.",
            why="what guides its decoder is the encoder's input, and a negative prompt is one of the decoder.",
            fix="Leave guidance_scale out.", argument="guidance_scale",
        )  # fmt: skip
    negative = _negative_prompt(config, prompt, settings, vocab_size)
    use = {"use_cache": model_kwargs.get("use_cache")}
    feed = make_feed(model, negative, settings, negative.width + max(limits), use)
    return Guidance(scale, negative.repeated(settings.copies), prompt.width, feed)


def _negative_prompt(config: GenerationConfig, prompt: Prompt, settings: Settings, vocab_size: int) -> Prompt:
    """The call's, one row a prompt; by default the last token of each prompt."""
    ids, mask = (_tensor(config, name) for name in (_IDS, _MASK))
    if ids is None:
        if mask is not None:
            raise InputError(f"{_MASK} is given without {_IDS}.", fix="Pass both, or none.", argument=_MASK)
        last = torch.tensor(prompt.last, device=prompt.ids.device)[:, None]
        ids = prompt.ids.gather(1, last)
    if ids.ndim != 2 or ids.shape[0] != prompt.ids.shape[0] or not ids.shape[1]:
        raise InputError(
            f"{_IDS} has shape {tuple(ids.shape)} for {prompt.ids.shape[0]} prompts.",
            fix="Pass ids of shape [prompts, tokens], one row a prompt.", argument=_IDS,
        )  # fmt: skip
    try:
        return read_prompt(ids.to(prompt.ids.device), mask, bos=settings.bos, vocab_size=vocab_size)
    except InputError as e:
        name = _MASK if e.argument == "attention_mask" else _IDS
        raise InputError(f"{name} cannot be used: {e.what}", why=e.why, fix=e.fix, argument=name) from e


def _tensor(config: GenerationConfig, name: str) -> Tensor | None:
    """A tensor as it is, or lists of numbers as one."""
    value = said(config, name)
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(
            f"{name} is no tensor of integers, nor lists of equal length that would make one.",
            fix="Pass a tensor [prompts, tokens].", argument=name,
        ) from e  # fmt: skip
