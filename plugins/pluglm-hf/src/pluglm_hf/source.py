"""What a strategy runs and continues: a decoder and its prompt, of a decoder-only model or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluglm.errors import InputError
from pluglm.forward import CausalLM
from pluglm.seq2seq import ConditionedLM, Seq2SeqLM
from pluglm_hf.caches import DynamicCache, HFCache, check_cache
from pluglm_hf.encoder_decoder_cache import EncoderDecoderCache
from pluglm_hf.fields import DEFAULTS
from pluglm_hf.layouts import Layouts, read_implementation
from pluglm_hf.refusals import unsupported

if TYPE_CHECKING:
    from pluglm.contracts.cache import CacheLayout
    from pluglm_hf.model import HFModel
    from pluglm_hf.settings import Said


@dataclass
class Decoder:
    """What the strategy is given.

    Attributes:
        model: a decoder, bound to encoded inputs if it belongs to an encoder-decoder.
        ids: [B, S]. mask: [B, S] or None.
        limit: tokens of its context; None: any number. longest: tokens of the longest prompt, padding aside.
        face: the caller's cache. layouts: of the model.
        encoded: the encoder's output, of an encoder-decoder.
    """

    model: CausalLM
    ids: Tensor
    mask: Tensor | None
    limit: int | None
    longest: int
    face: Any
    layouts: Layouts
    position_ids: Tensor | None = None
    encoded: Any = None

    def make_face(self, room: int) -> None:
        """A cache that the answer will hold. room: cells."""
        face = EncoderDecoderCache() if self.encoded is not None else DynamicCache()
        face.adopt(self.model, self.model.new_cache(batch_size=self.ids.shape[0], capacity=room))
        self.face = face


def decoder_of(model: HFModel, said: Said, inputs: Mapping[str, Any]) -> Decoder:
    """Read the inputs of a call. Raises InputError, UnsupportedRequestError."""
    layouts = model.layouts
    layout = model.core.layout
    face = inputs.get("past_key_values")
    check_cache(face)
    if said["cache_implementation"] is not None:
        if face is not None:
            raise InputError(
                f"past_key_values and cache_implementation={said['cache_implementation']!r} both name a cache.",
                fix="Leave one of them out.", argument="cache_implementation",
            )  # fmt: skip
        layout = layouts.of(*read_implementation(said["cache_implementation"], said["cache_config"]))
    ids = _ids(inputs.get("input_ids"), "input_ids", model)
    if ids is None and inputs.get("inputs_embeds") is not None:
        raise unsupported("inputs_embeds", "…", "strategies need the ids of what they continue.", "Pass input_ids.")
    if isinstance(model.core, Seq2SeqLM):
        return _conditioned(model, model.core, said, inputs, ids, layout, face)
    for name in ("encoder_outputs", "decoder_input_ids", "decoder_attention_mask"):
        if name in inputs:
            raise InputError(f"{name} is of encoder-decoders, which this model is none of.", fix="Leave it out.",
                             argument=name)  # fmt: skip
    if ids is None:
        ids = _begin(said["bos_token_id"], model)
    mask = _mask(inputs.get("attention_mask"), ids, said)
    bare = CausalLM(model.core.module, model.core.executor, layout, model.core.description, model.core.config)
    return Decoder(
        bare, ids, mask, _limit(bare, said, face), _longest(ids, mask), face, layouts,
        position_ids=inputs.get("position_ids"),
    )  # fmt: skip


def _conditioned(
    model: HFModel, core: Seq2SeqLM, said: Said, inputs: Mapping[str, Any], ids: Tensor | None,
    layout: CacheLayout | None, face: Any,
) -> Decoder:  # fmt: skip
    """The decoder of an encoder-decoder, whose encoder is run here, once."""
    if isinstance(face, HFCache) and face.get_seq_length():
        raise InputError(
            "the given cache is in use.", why="an encoder-decoder begins a new text for each prompt.",
            fix="Call its reset(), or leave past_key_values out.", argument="past_key_values",
        )  # fmt: skip
    if "position_ids" in inputs:
        raise unsupported("position_ids", "…", "an encoder-decoder counts positions itself.", "Leave it out.")
    encoded = inputs.get("encoder_outputs")
    source_mask = inputs.get("attention_mask")
    if encoded is None:
        if ids is None:
            raise InputError("there is no prompt.", fix="Pass input_ids.", argument="input_ids")
        source_mask = _mask(source_mask, ids, said)
        encoded = core.encode(ids, source_mask, output_hidden_states=bool(said["output_hidden_states"]))
    states = encoded.last_hidden_state if hasattr(encoded, "last_hidden_state") else encoded[0]
    B, Te = states.shape[:2]
    positions = torch.arange(Te, device=states.device).expand(B, Te)
    if source_mask is not None:
        real = source_mask.to(states.device) != 0
        positions = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
    start = _ids(inputs.get("decoder_input_ids"), "decoder_input_ids", model)
    first = said["decoder_start_token_id"]
    if first is None:
        first = said["bos_token_id"]
    if start is None:
        start = _begin(first, model, "decoder_start_token_id").expand(B, 1)
    mask = inputs.get("decoder_attention_mask")
    mask = None if mask is None else _mask(mask, start, said)
    if "decoder_input_ids" in inputs and first is not None and bool((start[:, 0] != first).any()):
        start = torch.cat((start.new_full((start.shape[0], 1), first), start), dim=1)
        mask = None if mask is None else torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)
    bare = Seq2SeqLM(core.module, core.executor, layout, core.description, core.config)
    decoder = ConditionedLM(bare, states, positions, ids if ids is not None else _unknown(said, states), source_mask)
    return Decoder(
        decoder, start, mask, _limit(decoder, said, face), start.shape[1], face, model.layouts, encoded=encoded
    )  # fmt: skip


def _unknown(said: Said, states: Tensor) -> Tensor:
    """Ids that stand for the encoder's input, [B, Te], where only its output is known: nothing may read them."""
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        if said[name] not in (None, DEFAULTS[name]):
            raise InputError(f"{name} needs the encoder's input.", why="only encoder_outputs were passed.",
                             fix="Pass input_ids as well.", argument=name)  # fmt: skip
    return torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)


def _ids(value: Any, name: str, model: HFModel) -> Tensor | None:
    """[B, S] on the model's device."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}, not a tensor.",
                         fix='Pass a tensor [B, S]: tokenizer(text, return_tensors="pt").', argument=name)  # fmt: skip
    if value.ndim != 2:
        raise InputError(f"{name} has shape {tuple(value.shape)}; it must be [B, S].",
                         fix=f"Write {name}[None] for one prompt.", argument=name)  # fmt: skip
    ids: Tensor = value.to(model.device)
    return ids


def _begin(token: Any, model: HFModel, name: str = "bos_token_id") -> Tensor:
    """[1, 1] the token that stands for no prompt."""
    if isinstance(token, list | tuple) and token:
        token = token[0]
    if type(token) is not int:
        raise InputError(
            "there is no prompt, and nothing says which token stands for none.", fix=f"Pass input_ids, or {name}.",
            argument="input_ids" if name == "bos_token_id" else name,
        )  # fmt: skip
    return torch.tensor([[token]], device=model.device)


def _mask(mask: Any, ids: Tensor, said: Said) -> Tensor | None:
    """The caller's mask; else, where the pad token is no end token and occurs, one that hides it (as the reference)."""
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise InputError(f"attention_mask is a {type(mask).__name__}, not a tensor.",
                             fix="Pass a tensor [B, S].", argument="attention_mask")  # fmt: skip
        given: Tensor = mask.to(ids.device)
        return given
    pad, eos = said["pad_token_id"], said["eos_token_id"]
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    hidden: Tensor = ids != pad
    return hidden.long()


def _longest(ids: Tensor, mask: Tensor | None) -> int:
    return ids.shape[1] if mask is None or mask.shape != ids.shape else int((mask != 0).sum(1).max())


def _limit(model: CausalLM, said: Said, face: Any) -> int | None:
    keeps = getattr(face, "inner", face) or model.layout
    if keeps is not None and keeps.streams and said["use_cache"] is not False:
        return None
    return model.description.max_seq_len
