"""Keys of Hugging Face configs that never change the logits of text generation, each with the reason.

Some are neutral at one value only (`is_encoder_decoder: false`); any other value is refused. The table was made from
the configs that Transformers 5 and 4 write; keys of one architecture belong in that architecture's reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Neutral:
    """Why a key does not matter, and the only values at which that is so (None: any value; null always is)."""

    reason: str
    values: tuple[Any, ...] | None = None

    def allows(self, value: Any) -> bool:
        """Whether the key is neutral at this value."""
        if value is None or self.values is None:
            return True
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)


_BOOKKEEPING = "tells where the file comes from"
_TRAINING = "acts in training only"
_OUTPUTS = "says what Transformers returns by default; the forward call says it here"
_HEADS = "belongs to classification heads"
_IDS = "names a token for generation or the tokenizer; the model computes the same without it"
_SEARCH = "a generation setting in an old place; generation_config.json and the call hold them now"

NEUTRAL: Mapping[str, Neutral] = {
    **dict.fromkeys(("_name_or_path", "architectures", "transformers_version"), Neutral(_BOOKKEEPING)),
    **dict.fromkeys(("tokenizer_class", "finetuning_task", "transformers.js_config"), Neutral(_BOOKKEEPING)),
    "auto_map": Neutral("names Python code in the repository; no code is taken because a config names it"),
    **dict.fromkeys(("dtype", "torch_dtype"), Neutral("the dtype of the weights; each tensor's header says it")),
    "use_cache": Neutral("generation always has a cache; the forward call can do without"),
    **dict.fromkeys(("initializer_range", "initializer_factor", "init_std"), Neutral("used to draw new weights only")),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "attn_pdrop"), Neutral(_TRAINING)),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop"), Neutral(_TRAINING)),
    **dict.fromkeys(("dropout", "resid_dropout", "embedding_dropout", "hidden_dropout_prob"), Neutral(_TRAINING)),
    **dict.fromkeys(("attention_probs_dropout_prob", "classifier_dropout", "router_jitter_noise"), Neutral(_TRAINING)),
    **dict.fromkeys(("router_aux_loss_coef", "output_router_logits", "label_smoothing"), Neutral(_TRAINING)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores"), Neutral(_OUTPUTS)),
    **dict.fromkeys(("return_dict", "return_dict_in_generate", "torchscript"), Neutral(_OUTPUTS)),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), Neutral(_HEADS)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), Neutral(_IDS)),
    **dict.fromkeys(("decoder_start_token_id", "unk_token_id", "prefix"), Neutral(_IDS)),
    "task_specific_params": Neutral("generation settings of pipelines; not part of the model"),
    "use_bfloat16": Neutral("a TensorFlow setting"),
    "tf_legacy_loss": Neutral("a TensorFlow setting"),
    "chunk_size_feed_forward": Neutral("a split of the feed-forward to save memory", (0,)),
    "pretraining_tp": Neutral("a slow split of the projections, to repeat rounding of the training run", (1,)),
    "pruned_heads": Neutral("heads that were cut out change every shape", ({},)),
    "is_encoder_decoder": Neutral("a decoder alone is built", (False,)),
    "is_decoder": Neutral("the model is a decoder in any case", (False, True)),
    "add_cross_attention": Neutral("there is no encoder to attend to", (False,)),
    "cross_attention_hidden_size": Neutral("there is no encoder to attend to", ()),
    "tie_encoder_decoder": Neutral("there is no encoder to share weights with", (False,)),
    # What Transformers 4 wrote into every config it dumped in full: neutral at the default, refused elsewhere, because
    # dropping another value would change the text in silence.
    "max_length": Neutral(_SEARCH, (20,)),
    "min_length": Neutral(_SEARCH, (0,)),
    "do_sample": Neutral(_SEARCH, (False,)),
    "early_stopping": Neutral(_SEARCH, (False,)),
    "num_beams": Neutral(_SEARCH, (1,)),
    "num_beam_groups": Neutral(_SEARCH, (1,)),
    "diversity_penalty": Neutral(_SEARCH, (0.0,)),
    "temperature": Neutral(_SEARCH, (1.0,)),
    "top_k": Neutral(_SEARCH, (50,)),
    "top_p": Neutral(_SEARCH, (1.0,)),
    "typical_p": Neutral(_SEARCH, (1.0,)),
    "repetition_penalty": Neutral(_SEARCH, (1.0,)),
    "length_penalty": Neutral(_SEARCH, (1.0,)),
    "no_repeat_ngram_size": Neutral(_SEARCH, (0,)),
    "encoder_no_repeat_ngram_size": Neutral(_SEARCH, (0,)),
    "num_return_sequences": Neutral(_SEARCH, (1,)),
    "remove_invalid_values": Neutral(_SEARCH, (False,)),
    **dict.fromkeys(("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"), Neutral(_SEARCH, ())),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), Neutral(_SEARCH, ())),
    "exponential_decay_length_penalty": Neutral(_SEARCH, ()),
}
