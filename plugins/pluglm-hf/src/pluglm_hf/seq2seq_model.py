"""An encoder-decoder as code written for transformers uses it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pluglm.seq2seq import Seq2SeqLM
from pluglm_hf.caches import settled
from pluglm_hf.encoder_decoder_cache import EncoderDecoderCache
from pluglm_hf.losses import shifted_right, token_loss
from pluglm_hf.model import HFModel
from pluglm_hf.seq2seq_outputs import Seq2SeqLMOutput


class PreTrainedSeq2SeqModel(HFModel):
    """An encoder-decoder."""

    SEQ2SEQ = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`."""
        return self.forward(*args, **kwargs)

    def get_encoder(self) -> Any:
        """The encoder as a callable: what it returns may be passed as encoder_outputs."""
        assert isinstance(self.core, Seq2SeqLM)
        return self.core.get_encoder()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> Any:
        """One pass of the decoder, and of the encoder before it; with a cache unless `use_cache=False`.

        Args:
            labels: [B, T] ids, -100 where there is none: they are the decoder's tokens, and `loss` their cross entropy.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.generation_config.decoder_start_token_id
            start = start if start is not None else self.config.decoder_start_token_id
            decoder_input_ids = shifted_right(labels, start, self.generation_config.pad_token_id)
        tokens = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
        if use_cache is None:
            use_cache = labels is None
        if past_key_values is None and use_cache and tokens is not None:
            past_key_values = EncoderDecoderCache()
        inner = None
        if tokens is not None:
            inner = settled(past_key_values, self.core, self.layouts, tokens.shape[0])
        if inner is not None and self.core.held(inner) is not None:  # type: ignore[operator]
            input_ids = None  # the cache holds the encoder's keys
        output = self.core(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, encoder_outputs=encoder_outputs, past_key_values=inner,
            inputs_embeds=inputs_embeds, decoder_inputs_embeds=decoder_inputs_embeds, use_cache=use_cache,
            output_hidden_states=bool(output_hidden_states), **more,
        )  # fmt: skip
        result = Seq2SeqLMOutput(
            None if labels is None else token_loss(output.logits, labels), output.logits,
            past_key_values if use_cache else None, output.decoder_hidden_states, output.encoder_last_hidden_state,
            output.encoder_hidden_states,
        )  # fmt: skip
        return result.to_tuple() if return_dict is False else result
