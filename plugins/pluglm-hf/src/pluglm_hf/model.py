"""A loaded model as code written for transformers uses it: `generate`, the forward call, and what is asked of both."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from pluglm.errors import InputError
from pluglm.forward import BuiltModel, CausalLM
from pluglm.seq2seq import Seq2SeqLM
from pluglm_hf.caches import DynamicCache, settled
from pluglm_hf.configs import GenerationConfig
from pluglm_hf.devices import device_of, dtype_of
from pluglm_hf.generate import generate
from pluglm_hf.layouts import Layouts
from pluglm_hf.losses import causal_loss
from pluglm_hf.model_config import PretrainedConfig
from pluglm_hf.outputs import CausalLMOutputWithPast
from pluglm_hf.own_settings import check_config, own_settings
from pluglm_hf.refusals import unsupported
from pluglm_hf.results import transition_scores
from pluglm_hf.surface import GenerationSurface

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel
    from pluglm_hf.loading import Wishes


class HFModel:
    """What decoder-only models and encoder-decoders share.

    Args:
        wishes: what to load.

    Attributes:
        language_model: pluglm's, with the plan. core: its forward contract. layouts: of caches.
        config: config.json by attribute. generation_config: what holds for calls that say nothing else.
    """

    SEQ2SEQ = False
    main_input_name = "input_ids"
    language_model: LanguageModel
    core: BuiltModel
    layouts: Layouts
    config: PretrainedConfig
    generation_config: Any
    training = False

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.name_or_path = wishes.name
        self._adopt(wishes.language_model())
        self.generation_config = own_settings(self.language_model, wishes)
        check_config(wishes.config, self.config)

    def _adopt(self, lm: LanguageModel) -> None:
        if isinstance(lm.model, Seq2SeqLM) != self.SEQ2SEQ:
            kind, door = "a decoder-only model", "AutoModelForCausalLM"
            if not self.SEQ2SEQ:
                kind, door = "an encoder-decoder", "AutoModelForSeq2SeqLM"
            raise InputError(f"{lm.plan.model_type} is {kind}.", fix=f"Use {door}.", argument="model")
        self.language_model, self.core, self.layouts = lm, lm.model, Layouts(lm)
        self.config = PretrainedConfig(lm.model.config, lm.model.description)
        vars(self.config)["_attn_implementation"] = self.wishes.load["attention"]
        self.hf_device_map = {"": str(lm.model.device)}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.language_model!r}>"

    # Generation

    def generate(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None, stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Any = None, synced_gpus: bool | None = None, assistant_model: Any = None,
        streamer: Any = None, negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None, custom_generate: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Generate.

        Args:
            inputs: [B, S] the prompts, or what a tokenizer returned; or input_ids=…. Of an encoder-decoder they are the
                encoder's.
            **kwargs: fields of GenerationConfig, inputs of the model, `tokenizer` (for stop strings where the folder
                has none), `generator` or `seed`, `decoding` (a strategy of pluglm by name).
        Returns: sequences [R, S], prompt included as the reference has it; with return_dict_in_generate an output.
        Raises: InputError, UnsupportedRequestError, PlanError, ContextLengthError; each says what to do.
        """
        named = {
            "generation_config": generation_config, "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus, "assistant_model": assistant_model, "streamer": streamer,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }  # fmt: skip
        if custom_generate is not None:
            from pluglm_hf.custom import run_custom

            return run_custom(self, custom_generate, inputs, named, kwargs)
        return generate(self, inputs, named, kwargs)

    def compute_transition_scores(
        self, sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:  # fmt: skip
        """The score that each chosen token had, [R, new tokens]."""
        return transition_scores(sequences, scores, beam_indices, normalize_logits=normalize_logits)

    def can_generate(self) -> bool:
        """Yes."""
        return True

    # What it is

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.core.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.core.dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Of the built module."""
        return self.core.module.parameters(recurse)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Numbers in all parameters; a tied head counts once."""
        embedding = {id(p) for p in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        found = (p for p in self.parameters() if id(p) not in embedding and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in found)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters, and of buffers."""
        tensors = list(self.parameters()) + (list(self.core.module.buffers()) if return_buffers else [])
        return sum(t.nelement() * t.element_size() for t in tensors)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, weight [V, C]."""
        return self.core.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.core.get_output_embeddings()

    def eval(self) -> Any:
        """Itself: a loaded model is never in training."""
        return self

    def train(self, mode: bool = True) -> Any:
        """Refused but for `train(False)`."""
        if mode:
            raise unsupported("train", True, "pluglm is for inference.", "Train with another library, then load.")
        return self

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **arguments: Any) -> None:
        """Write weights, config, generation settings and tokenizer, so that `from_pretrained` reads them back."""
        if not safe_serialization or arguments:
            name, value = next(iter(arguments.items()), ("safe_serialization", False))
            raise unsupported(f"save_pretrained({name})", value, "a folder of safetensors is written, whole.",
                              "Leave it out.")  # fmt: skip
        self.language_model.save(save_directory)
        self.generation_config.save_pretrained(save_directory)

    # Moves

    def to(self, *args: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
        """Itself. Another device means loading again from the files; another dtype is refused."""
        for value in args:
            device, dtype = (device, value) if isinstance(value, torch.dtype) else (value, dtype)
        if dtype is not None and dtype_of(dtype, None) != str(self.dtype).removeprefix("torch."):
            raise unsupported("to", dtype, f"the weights were read as {self.dtype}.",
                              f"Pass dtype={dtype} to from_pretrained.")  # fmt: skip
        if device is None:
            return self
        wanted = device_of(device, argument="device")
        if torch.device(wanted) != self._placed(wanted):
            if any(p._version for p in self.parameters() if not p.is_inference()):
                raise unsupported("to", device, "weights were changed since they were read from the files.",
                                  "Pass device_map to from_pretrained, and change them then.")  # fmt: skip
            self._adopt(self.wishes.language_model(device=wanted))
        return self

    def _placed(self, wanted: str) -> torch.device:
        """Where it is, without a number if the wish has none."""
        return self.device if ":" in wanted else torch.device(self.device.type)

    def cuda(self, device: int | str | torch.device | None = None) -> Any:
        """On a CUDA device."""
        return self.to(device if device is not None else "cuda")

    def cpu(self) -> Any:
        """On the CPU."""
        return self.to("cpu")

    def half(self) -> Any:
        """In float16, if it is."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """In bfloat16, if it is."""
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        """In float32, if it is."""
        return self.to(torch.float32)

    # What is refused by name

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """The embedding, if it has this size already; else refused."""
        size = self.core.description.vocab_size
        if new_num_tokens not in (None, size):
            raise unsupported("resize_token_embeddings", new_num_tokens, f"the model was trained with {size} tokens.",
                              "Use existing tokens: tokenizer.pad_token = tokenizer.eos_token.")  # fmt: skip
        return self.get_input_embeddings()

    def set_attn_implementation(self, attn_implementation: Any, **options: Any) -> NoReturn:
        """Refused."""
        raise unsupported("set_attn_implementation", attn_implementation, "it is planned before weights are read.",
                          "Pass attn_implementation to from_pretrained.")  # fmt: skip

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise unsupported("push_to_hub", args, "pluglm writes to no other machine.",
                          "save_pretrained, then upload the folder with huggingface_hub.")  # fmt: skip

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise unsupported("generate_batch", "…", "batches that change while they run are an engine's work.",
                          "Pass padded prompts to generate.")  # fmt: skip


class PreTrainedModel(HFModel, GenerationSurface):
    """A decoder-only model."""

    def __init__(self, wishes: Wishes) -> None:
        HFModel.__init__(self, wishes)

    def _adopt(self, lm: LanguageModel) -> None:
        super()._adopt(lm)
        assert isinstance(lm.model, CausalLM)
        own, tokenizer = self.__dict__.get("generation_config"), lm.tokenizer
        GenerationSurface.__init__(self, lm.model, decode=tokenizer.decode if tokenizer is not None else None)
        vars(self.config)["_attn_implementation"] = self.wishes.load["attention"]
        self.generation_config = own  # of before a move; at first it is read after this

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass; with a cache unless `use_cache=False`.

        Args:
            labels: [B, T] ids, -100 where there is none: `loss` is the mean cross entropy of each next token.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None and past_key_values is not None:
            settled(past_key_values, self.core, self.layouts, tokens.shape[0])
        elif tokens is not None and use_cache is not False and self.core.layout is not None:
            past_key_values = DynamicCache()
            settled(past_key_values, self.core, self.layouts, tokens.shape[0])
        output = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep,
            output_hidden_states, None, **more,
        )  # fmt: skip
        assert isinstance(output, CausalLMOutputWithPast)
        if labels is not None:
            assert output.logits is not None
            output.loss = causal_loss(output.logits, labels)
        return output.to_tuple() if return_dict is False else output

    def eval(self) -> PreTrainedModel:
        """Itself."""
        return self

    @functools.wraps(HFModel.generate)  # so that help() shows its arguments
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """See `HFModel.generate`."""
        return HFModel.generate(self, *args, **kwargs)
