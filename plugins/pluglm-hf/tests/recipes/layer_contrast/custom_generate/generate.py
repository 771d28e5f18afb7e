"""Contrasts the last layer with an inner one, chosen by how far their distributions are apart."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateNonBeamOutput, GenerationMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)


def _loop(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs,
) -> GenerateNonBeamOutput | torch.LongTensor:
    if model.config.is_encoder_decoder:
        raise ValueError("only decoders have layers to contrast")
    if getattr(model, "_is_stateful", False):
        raise ValueError("a state cannot be read layer by layer")
    pad = generation_config._pad_token_tensor
    keep = generation_config.return_dict_in_generate
    scores = () if (keep and generation_config.output_scores) else None
    hidden = () if (keep and generation_config.output_hidden_states) else None
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)

    final = model.config.get_text_config().num_hidden_layers
    first = 2 if model.config.tie_word_embeddings else 0
    layers = generation_config.dola_layers
    if layers == "low":
        candidates = list(range(first, max(final // 2, first + 1), 2)) or [first]
    elif isinstance(layers, list):
        candidates = [i for i in layers if i < final]
    else:
        raise ValueError("dola_layers must be 'low' or a list")
    rate = float(np.clip(getattr(generation_config, "contrast_rate", 1.0), 0.0, 4.0))
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("there is no head")

    rows = input_ids.shape[0]
    unfinished = torch.ones(rows, dtype=torch.long, device=input_ids.device)
    if hasattr(model, "_get_initial_cache_position"):
        model_kwargs = model._get_initial_cache_position(rows, input_ids.device, model_kwargs)
    finished, first_pass = False, True
    while model._has_unfinished_sequences(finished, synced_gpus, device=input_ids.device):
        length = None if first_pass or not model_kwargs["use_cache"] else 1
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=first_pass, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True, output_attentions=False, output_hidden_states=True)
        first_pass = False
        mature = outputs.logits[:, -1, :].detach().clone().float()
        inner = {i: head(outputs.hidden_states[i][:, -1, :]).float() for i in candidates}
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        p = F.softmax(mature, dim=-1)
        apart = {i: F.kl_div(F.log_softmax(q, dim=-1), p, reduction="batchmean") for i, q in inner.items()}
        furthest = max(candidates, key=lambda i: float(apart[i]))
        contrast = mature.log_softmax(-1) - rate * 0.1 * inner[furthest].log_softmax(-1)
        contrast = contrast.masked_fill(p < 0.01 * p.amax(-1, keepdim=True), -1e3)
        processed = logits_processor(input_ids, contrast)
        if scores is not None:
            scores += (processed,)
        if hidden is not None:
            hidden += (outputs.hidden_states,)
        if generation_config.do_sample:
            tokens = torch.multinomial(F.softmax(processed, dim=-1), 1).squeeze(1)
        else:
            tokens = torch.argmax(processed, dim=-1)
        if has_end:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        finished = unfinished.max() == 0
    if streamer is not None:
        streamer.end()
    if keep:
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=scores, hidden_states=hidden,
            past_key_values=model_kwargs.get("past_key_values"),
        )  # fmt: skip
    return input_ids


def generate(model, *args, **kwargs):
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("only decoders have layers to contrast")
    return GenerationMixin.generate(model, *args, custom_generate=_loop, **kwargs)
