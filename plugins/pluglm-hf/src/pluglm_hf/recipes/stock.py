"""Greedy decoding and sampling for recipes that call `model.generate(…)` for a part of their work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pluglm_hf.criteria import StoppingCriteriaList
from pluglm_hf.outputs import GenerateDecoderOnlyOutput
from pluglm_hf.processors import LogitsProcessorList
from pluglm_hf.recipes.config import RecipeConfig
from pluglm_hf.refusals import unsupported
from pluglm_hf.surface import GenerationSurface


def sample(
    model: GenerationSurface, input_ids: Tensor, logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList, generation_config: RecipeConfig, streamer: Any = None, **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:  # fmt: skip
    """One token a row and pass, as `GenerationMixin._sample` of transformers 5.23; draws from torch's generator.

    Raises: UnsupportedRequestError for searches and for drafts.
    """
    for name in ("num_beams", "prompt_lookup_num_tokens", "num_beam_groups"):
        if (getattr(generation_config, name) or 0) > 1:
            raise unsupported(
                name, getattr(generation_config, name), "inside a recipe, generate is greedy or draws.",
                f"Call lm.generate({name}=…) without the recipe.",
            )  # fmt: skip
    keep = generation_config.return_dict_in_generate
    scores_of: list[Tensor] = []
    logits_of: list[Tensor] = []
    alive = torch.ones(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        scores = logits_processor(input_ids, logits.clone() if generation_config.output_logits else logits)
        if keep and generation_config.output_scores:
            scores_of.append(scores)
        if keep and generation_config.output_logits:
            logits_of.append(logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if generation_config._pad_token_tensor is not None:
            tokens = torch.where(alive.bool(), tokens, generation_config._pad_token_tensor)
        input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        alive = alive & ~stopping_criteria(input_ids, scores)
        if not alive.any():
            break
        step = 1 if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
    if streamer is not None:
        streamer.end()
    if not keep:
        return input_ids
    return GenerateDecoderOnlyOutput(
        input_ids, tuple(scores_of) or None, tuple(logits_of) or None,
        past_key_values=model_kwargs.get("past_key_values"),
    )  # fmt: skip
