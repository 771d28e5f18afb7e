"""The forward contract of the field for encoder-decoders, and the view of one that decoding strategies run.

`Seq2SeqLM` is what users call: `model(input_ids=…, decoder_input_ids=…)`. A strategy knows decoders only, and needs to
know no more: `Seq2SeqLM.conditioned` gives it one whose passes all attend to the same encoded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pluglm.contracts.model import (
    EncoderDecoderModule,
    EncoderInput,
    ForwardInput,
    ForwardOutput,
    ModelDescription,
)
from pluglm.errors import InputError, PluginError
from pluglm.forward import BuiltModel, CausalLM
from pluglm.outputs import EncodedOutput, Seq2SeqOutput
from pluglm.passed import Passed, check_length, unknown_argument

if TYPE_CHECKING:
    from pluglm.contracts.cache import Cache, CacheLayout
    from pluglm.contracts.runtime import Executor
    from pluglm.contracts.views import KeyInfo


class Seq2SeqLM(BuiltModel):
    """An encoder-decoder. The encoder is run by calling the module, the decoder by the executor."""

    def __init__(
        self, module: nn.Module, executor: Executor, layout: CacheLayout | None, description: ModelDescription,
        config: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(module, executor, layout, description, config)
        if not callable(getattr(module, "encode", None)):
            raise PluginError(
                f"the module of this {description.model_type} model has no `encode`.",
                why="its description says is_encoder_decoder, and such a module is an EncoderDecoderModule.",
                fix="Report this to the authors of the architecture plugin.", plugin=description.model_type,
            )  # fmt: skip

    def encode(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        inputs_embeds: Tensor | None = None, output_hidden_states: bool = False,
    ) -> EncodedOutput:  # fmt: skip
        """Run the encoder. What it returns may be passed as `encoder_outputs`, beside the same `attention_mask`.

        Args:
            input_ids: [B, Te] int64; or inputs_embeds: [B, Te, C].
            attention_mask: [B, Te], 1 for a token, 0 for padding on either side. None: all tokens.
        Raises: InputError, ContextLengthError.
        """
        return self._encode(Passed(input_ids, inputs_embeds, attention_mask), output_hidden_states)[0]

    def get_encoder(self) -> Callable[..., EncodedOutput]:
        """The encoder as a callable, by the name that decoding methods know."""
        return self.encode

    def conditioned(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ConditionedLM:
        """Encode these prompts [B, Te] and return the decoder that attends to them."""
        encoded, positions = self._encode(Passed(input_ids, None, attention_mask), False)
        return ConditionedLM(self, encoded.last_hidden_state, positions, input_ids, attention_mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> Seq2SeqOutput | tuple[Any, ...]:
        """One pass of the decoder, and of the encoder before it where its output is not there yet.

        Args:
            input_ids: [B, Te] int64, the encoder's; or inputs_embeds: [B, Te, C]; or encoder_outputs. With a cache that
                holds the encoder's keys already: none of them, or the same encoder_outputs again.
            attention_mask: [B, Te] of the encoder's input, 1 for a token, 0 for padding on either side.
            decoder_input_ids: [B, T] int64; or decoder_inputs_embeds: [B, T, C].
            decoder_attention_mask: [B, cache length + T]. None: all tokens.
            encoder_outputs: what `encode` returned; or anything with `last_hidden_state`; or a tuple that begins so.
            past_key_values, use_cache, cache_position, logits_to_keep, return_dict: as in `CausalLM.forward`, of the
                decoder.
            output_hidden_states: of both stacks.
        Raises: InputError for what cannot be honoured, ContextLengthError if a stack or the cache holds no more.
        """
        if unknown:
            raise unknown_argument(unknown, _KNOWN)
        passed = Passed(decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, prefix="decoder_")
        inputs = self._inputs(passed, past_key_values, use_cache, cache_position, logits_to_keep, output_hidden_states)
        source = Passed(input_ids, inputs_embeds, attention_mask)
        rows = passed.tokens.shape[0]
        held = self.held(inputs.cache) if inputs.cache is not None else None
        encoded: EncodedOutput | None
        if held is not None:
            encoded = _read_outputs(encoder_outputs, self.description.hidden_size)
            _check_repeated(source, encoded, held)
        else:
            encoded, positions = self._encoded(source, encoder_outputs, rows, output_hidden_states)
            inputs = replace(inputs, encoder_states=encoded.last_hidden_state, encoder_positions=positions)
        output = _run(self._run, inputs)
        kept = inputs.cache if use_cache is not False else None
        result = Seq2SeqOutput(output.logits, kept, output.hidden_states, encoded)
        return result.to_tuple() if return_dict is False else result

    def held(self, cache: Cache) -> KeyInfo | None:
        """What the encoder's keys in a cache are; None before its first pass."""
        slot = next((i for i, slot in enumerate(self.description.slots) if slot.kind == "cross"), None)
        found = cache.cross(slot) if slot is not None else None
        return found[1] if found is not None else None

    def _encoded(self, source: Passed, outputs: Any, rows: int, hidden: bool) -> tuple[EncodedOutput, Tensor]:
        """The encoder's output for a first pass of `rows` rows, computed unless it was given, and its positions."""
        if (source.ids is not None) + (source.embeds is not None) + (outputs is not None) != 1:
            raise InputError(
                "give exactly one of input_ids, inputs_embeds and encoder_outputs.",
                why="the decoder attends to one encoded input, and no cache holds it yet.", argument="input_ids",
            )  # fmt: skip
        given = _read_outputs(outputs, self.description.hidden_size)
        if given is not None:
            source = replace(source, embeds=given.last_hidden_state)
        encoder_rows = source.tokens.shape[0]
        if encoder_rows != rows:
            raise InputError(
                f"the encoder's input has {encoder_rows} rows, the decoder's has {rows}.",
                fix="Pass one row of the encoder's input for each of the decoder's.", argument="decoder_input_ids",
            )  # fmt: skip
        if given is None:
            return self._encode(source, hidden)
        return given, source.positions(None, None)[0].expand(rows, -1)

    def _encode(self, source: Passed, hidden: bool) -> tuple[EncodedOutput, Tensor]:
        """Run the encoder: its output, and positions [B, Te] with -1 for padding."""
        B, Te = source.shape(vocab_size=self.description.vocab_size, hidden_size=self.description.hidden_size)
        limit = self.description.max_encoder_len
        check_length(Te, limit, whose="encoder")
        positions, dense = source.positions(None, limit)
        module = cast("EncoderDecoderModule", self.module)
        output = module.encode(EncoderInput(source.ids, positions, source.embeds, dense, hidden))
        return EncodedOutput(output.states, output.hidden_states), positions.expand(B, Te)


class ConditionedLM(CausalLM):
    """The decoder of an encoder-decoder, bound to encoded inputs: a `CausalLM` for every strategy.

    Its caches get the encoder's keys in their first pass. A pass may have a multiple of the encoder's rows: row i of n
    times as many belongs to input i // n, as after `Cache.repeat(n)`.

    Attributes:
        encoder_input_ids, encoder_attention_mask: [B, Te] the encoder's input, for processors that go by it; the mask
            is None where there is no padding.
    """

    def __init__(
        self, model: Seq2SeqLM, states: Tensor, positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Called by `Seq2SeqLM.conditioned`. states: [B, Te, C]. positions: [B, Te], negative: padding."""
        super().__init__(model.module, model.executor, model.layout, model.description, model.config)
        self._held, self._decode = model.held, model._run
        self._states, self._positions = states, positions
        self.encoder_input_ids, self.encoder_attention_mask = input_ids, attention_mask
        self._run = self._attending

    def _attending(self, inputs: ForwardInput) -> ForwardOutput:
        """Run a pass of the decoder, with the encoder's states unless the cache holds their keys."""
        if inputs.cache is not None and self._held(inputs.cache) is not None:
            return self._decode(inputs)
        tokens = inputs.token_ids if inputs.token_ids is not None else inputs.embeds
        assert tokens is not None
        copies, rest = divmod(tokens.shape[0], self._states.shape[0])
        if rest:
            raise InputError(
                f"{tokens.shape[0]} rows cannot be shared among {self._states.shape[0]} encoded inputs.",
                fix="Run as many rows of each input.", argument="input_ids",
            )  # fmt: skip
        states, positions = self._states, self._positions
        if copies > 1:
            states, positions = states.repeat_interleave(copies, 0), positions.repeat_interleave(copies, 0)
        return _run(self._decode, replace(inputs, encoder_states=states, encoder_positions=positions))


def _run(decode: Callable[[ForwardInput], ForwardOutput], inputs: ForwardInput) -> ForwardOutput:
    """One pass of the decoder. If it fails on an empty cache, the cache is empty again.

    Until the next pass begins, a cache may still show the encoder's keys of one that was never committed.
    """
    try:
        return decode(inputs)
    except BaseException:
        if inputs.encoder_states is not None and inputs.cache is not None and inputs.cache.length == 0:
            inputs.cache.reset()
        raise


def _read_outputs(outputs: Any, hidden_size: int) -> EncodedOutput | None:
    """`encoder_outputs`, in whichever form the field passes them."""
    if outputs is None:
        return None
    if isinstance(outputs, tuple | list):
        states, hidden = (*outputs, None, None)[:2]
    else:
        states, hidden = getattr(outputs, "last_hidden_state", None), getattr(outputs, "hidden_states", None)
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[2] != hidden_size:
        shape = f" whose states have shape {tuple(states.shape)}" if isinstance(states, Tensor) else ""
        raise InputError(
            f"encoder_outputs is a {type(outputs).__name__}{shape}.",
            why=f"it must have a last_hidden_state [B, Te, {hidden_size}], or be a tuple that begins with one.",
            fix="Pass what model.encode(…) returned.", argument="encoder_outputs",
        )  # fmt: skip
    return EncodedOutput(states, hidden)


def _check_repeated(source: Passed, outputs: EncodedOutput | None, held: KeyInfo) -> None:
    """What a later call says of the encoder's input again must agree with the cache, which is what will be read."""
    for name, value in (("input_ids", source.ids), ("inputs_embeds", source.embeds)):
        if value is not None:
            raise InputError(
                f"the cache holds the encoder's keys already; {name} would be read by nobody.",
                why="the encoder's output is projected once a sequence.",
                fix=f"Leave {name} out after the first call (encoder_outputs may be repeated). For another input, make "
                "a new cache or `reset()` this one.",
                argument=name,
            )
    mask, real = source.mask, held.positions >= 0  # [B, Te]
    if mask is not None and (mask.shape != real.shape or not torch.equal(mask.to(real.device) != 0, real)):
        raise InputError(
            f"attention_mask, of shape {tuple(mask.shape)}, is not the one under which the cache's "
            f"{tuple(real.shape)} encoder tokens were fed.",
            fix="Repeat that mask, with its rows in the cache's order, or leave it out.", argument="attention_mask",
        )  # fmt: skip
    if outputs is not None and outputs.last_hidden_state.shape[:2] != real.shape:
        raise InputError(
            f"encoder_outputs holds {tuple(outputs.last_hidden_state.shape[:2])} states, the cache the keys of "
            f"{tuple(real.shape)}.",
            fix="Repeat the encoder_outputs of the first call, or leave them out.", argument="encoder_outputs",
        )  # fmt: skip


_KNOWN = (
    "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "past_key_values",
    "inputs_embeds", "decoder_inputs_embeds", "use_cache", "cache_position", "logits_to_keep", "output_hidden_states",
    "return_dict",
)  # fmt: skip
