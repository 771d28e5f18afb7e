"""One call's settings: who wins, which strategy they mean, and what that strategy is told.

A call's own arguments win over the configuration passed to it, which wins over the model's, which wins over the
reference's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pluglm.contracts.decoding import GenerationConfig as Settings
from pluglm.errors import InputError
from pluglm_hf.fields import BEAMS, DEFAULTS, GUESSING, OUTPUTS, SAMPLING
from pluglm_hf.refusals import refuse_said, unsupported

if TYPE_CHECKING:
    from pluglm_hf.configs import GenerationConfig

#: What is known and cannot be honoured, whatever the strategy: why, and what to do.
REFUSED: Mapping[str, tuple[str, str]] = {
    "output_attentions": ("attention backends do not keep their weights.", "Leave it out."),
    "compile_config": (
        "how a model is run is planned when it is loaded.",
        "Leave it out, or use pluglm.load(executor=…).",
    ),
    "is_assistant": ("the strategy tells the assistant itself.", "Leave it out."),
    "low_memory": ("it was for a search that ran its beams one by one.", "Leave it out, or lower num_beams."),
    "token_healing": ("a prompt of ids has no text to heal.", "Use pluglm: lm.generate(text, token_healing=True)."),
}
#: Fields that this room or the next ones read themselves: a strategy is not told of them.
_READ_HERE = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "do_sample", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "return_dict_in_generate", "decoder_start_token_id",
    "disable_compile", *REFUSED,
})  # fmt: skip
#: Fields whose value decides something before a strategy, which looks at the others, is chosen.
_FLAGS = ("do_sample", "use_cache", "return_dict_in_generate")
_WHOLE = ("max_new_tokens", "min_new_tokens", "min_length", "num_beams", "num_beam_groups", "num_return_sequences",
          "pad_token_id")  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What holds for a call.

    Attributes:
        values: every field. explicit: those that the call or its configuration set to something. asked: those of these
            that the call itself said.
    """

    values: Mapping[str, Any]
    explicit: frozenset[str]
    asked: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def sampled(self) -> bool:
        """Are tokens drawn?"""
        return bool(self.values["do_sample"])

    @property
    def beams(self) -> bool:
        """Is it a search?"""
        return (self.values["num_beams"] or 1) > 1 or bool(self.values["force_words_ids"] or self.values["constraints"])


def merged(own: GenerationConfig, passed: GenerationConfig | None, call: Mapping[str, Any]) -> Said:
    """Who wins. A None of the call's own switches a field off, also against a default.

    Raises: InputError for contradictions, UnsupportedRequestError for what nothing here can honour.
    """
    layers = [own.to_diff_dict(), passed.to_diff_dict() if passed is not None else {}, dict(call)]
    values = dict(DEFAULTS)
    for layer in layers:
        values.update(layer)
    if values["cache_implementation"] == "hybrid" and not any("cache_implementation" in layer for layer in layers[1:]):
        values["cache_implementation"] = None  # a file of an older version; the plan knows the model's windows
    asked = frozenset(name for name, value in call.items() if value is not None)
    said = Said(values, asked | frozenset(layers[1]), asked)
    for names, kind, rule in ((_FLAGS, bool, "True or False"), (_WHOLE, int, "an integer")):
        for name in names:
            if values[name] is not None and type(values[name]) is not kind:
                raise InputError(f"{name}={values[name]!r} makes no sense: it must be {rule}.", argument=name)
    refuse_said(REFUSED, values)
    _check_read(said)
    return said


def _check_read(said: Said) -> None:
    """Raise for a field that was said and that nothing would read. (Those of the model's files give way.)"""
    guessed = any(said[name] for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type"))
    rules = (
        (SAMPLING, said.sampled, "it is read only while tokens are drawn.", "Pass do_sample=True, or leave it out."),
        (BEAMS, said.beams, "it is read only by a search.", "Pass num_beams=4, or leave it out."),
        (("output_scores", "output_logits"), bool(said["return_dict_in_generate"]),
         "without return_dict_in_generate only sequences are returned.", "Pass return_dict_in_generate=True too."),
        (("cache_config",), said["cache_implementation"] is not None, "it is about a cache that is named.",
         'Pass cache_implementation="quantized" too.'),
        (("max_matching_ngram_size",), guessed, "it is read only by guesses.", "Pass prompt_lookup_num_tokens too."),
    )  # fmt: skip
    for names, read, why, fix in rules:
        for name in names:
            if name == "top_k" and said["penalty_alpha"]:
                continue
            if not read and name in said.explicit and said[name] not in (None, DEFAULTS[name]):
                raise unsupported(name, said[name], why, fix)
    if said.sampled or said.beams or (said["num_return_sequences"] or 1) == 1:
        return
    why = "greedy decoding gives one sequence of a prompt."
    raise unsupported("num_return_sequences", said["num_return_sequences"], why, "Pass do_sample=True or num_beams.")


def strategy_of(said: Said, *, assisted: bool) -> str:
    """The decoding provider that these fields mean."""
    if assisted:
        return "assisted"
    if said["speculation_type"] is not None or said["use_mtp"]:
        name = "speculation_type" if said["speculation_type"] is not None else "use_mtp"
        raise unsupported(name, said[name], "no installed strategy guesses with heads of the model.",
                          "Pass assistant_model or prompt_lookup_num_tokens.")  # fmt: skip
    if said["prompt_lookup_num_tokens"] is not None:
        return "prompt-lookup"
    if said["assistant_early_exit"] is not None:
        return "early-exit"
    if said["dola_layers"] is not None:
        return "dola"
    if said["force_words_ids"] or said["constraints"]:
        return "constrained-beam"
    if (said["num_beams"] or 1) > 1:
        if (said["num_beam_groups"] or 1) > 1:
            return "diverse-beam"
        return "beam-sampling" if said.sampled else "beam"
    if said["penalty_alpha"]:
        return "contrastive-search"
    return "sampling" if said.sampled else "greedy"


def strategy_settings(said: Said, strategy: str, *, width: int, limit: int | None) -> Settings:
    """What the strategy is told.

    Args:
        width: cells of the prompt. limit: of the model's context; None: unbounded.
    """
    fields: dict[str, Any] = {}
    for name, value in said.values.items():
        if name in _READ_HERE or value is None or not _counts(name, said, strategy):
            continue
        if name in ("pad_token_id", "bos_token_id", "eos_token_id", "seed") or value != DEFAULTS[name]:
            fields[name] = list(value) if isinstance(value, tuple) and name != "seed" else value
    if said.sampled and strategy != "contrastive-search":
        for name in ("temperature", "top_k"):
            if said[name] not in (None, 0):
                fields[name] = said[name]
        if not any(name in fields for name in ("temperature", "top_k", "top_p", "min_p")):
            fields["temperature"] = 1.0
    if strategy == "contrastive-search":
        fields["top_k"] = said["top_k"]
    if isinstance(fields.get("eos_token_id"), list) and not fields["eos_token_id"]:
        del fields["eos_token_id"]
    fields["max_new_tokens"] = _new_tokens(said, width, limit)
    if least := _least(said, width):
        fields["min_new_tokens"] = least
    return Settings().updated(**fields)


def _counts(name: str, said: Said, strategy: str) -> bool:
    """Does a field mean anything for the strategy? `_check_read` has refused those that were said for nothing."""
    if name in SAMPLING:
        return said.sampled
    if name in BEAMS:
        return said.beams
    if name in GUESSING:
        return strategy in ("assisted", "prompt-lookup", "early-exit")
    if name in OUTPUTS:
        return bool(said["return_dict_in_generate"])
    return True


def _new_tokens(said: Said, width: int, limit: int | None) -> int:
    count, total = said["max_new_tokens"], said["max_length"]
    own = "max_length" in said.explicit and "max_new_tokens" not in said.explicit
    if type(count) is int and not own:
        return count
    if total is None or (total == DEFAULTS["max_length"] and "max_length" not in said.explicit):
        room = limit - width if limit is not None else None
        new = int(DEFAULTS["max_length"])  # so many new ones, if nobody says anything
        return new if room is None else max(1, min(new, room))
    if type(total) is not int or total <= width:
        raise InputError(
            f"max_length={total!r} leaves no room after a prompt of {width} cells.",
            fix="Raise max_length, or use max_new_tokens, which does not count the prompt.", argument="max_length",
        )  # fmt: skip
    return total - width


def _least(said: Said, width: int) -> int:
    least: int = said["min_length"] or 0
    new: int | None = said["min_new_tokens"]
    return new if new is not None else max(0, least - width)
