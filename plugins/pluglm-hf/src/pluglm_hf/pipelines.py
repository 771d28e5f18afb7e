"""`pipeline("text-generation", model=…)`: text or a chat in, text or a chat out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm_hf.refusals import unsupported

if TYPE_CHECKING:
    from pluglm_hf.model import HFModel
    from pluglm_hf.tokenizer import PreTrainedTokenizer

#: Task -> is it of encoder-decoders?
TASKS: Mapping[str, bool] = {"text-generation": False, "text2text-generation": True}
#: What holds where neither a call nor the model's files say otherwise, as in transformers 5.23.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "text-generation": {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7},
    "text2text-generation": {"max_new_tokens": 256},
}
#: Arguments of the reference's pipelines that are no fields of `generate`, and are refused here.
_REFUSED = ("return_text", "return_tensors", "return_type", "clean_up_tokenization_spaces", "prefix",
            "handle_long_generation", "continue_final_message", "tools", "documents", "stop_sequence")  # fmt: skip


def pipeline(
    task: str | None = None, model: Any = None, config: Any = None, tokenizer: Any = None, *,
    device: Any = None, device_map: Any = None, dtype: Any = None, torch_dtype: Any = None,
    revision: str | None = None, token: Any = None, trust_remote_code: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None, **settings: Any,
) -> TextGenerationPipeline:  # fmt: skip
    """A pipeline.

    Args:
        task: "text-generation", or "text2text-generation" for an encoder-decoder; None: by the model. model: a folder,
            a name, or a loaded model. tokenizer: as model; None: the model's.
        device, device_map, dtype, revision, token, model_kwargs: of loading. **settings: of every call.
    Raises: UnsupportedRequestError for other tasks; what loading raises.
    """
    from pluglm_hf.auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from pluglm_hf.model import HFModel

    if task is not None and task not in TASKS:
        raise unsupported("task", task, "pluglm runs language models.", f"Pass {' or '.join(map(repr, TASKS))}.")
    if model is None:
        raise InputError("no model was named.", why="none is fetched because a task names it.",
                         fix='Pass model="folder-or-org/name".', argument="model")  # fmt: skip
    if not isinstance(model, HFModel):
        said = {
            "config": config, "device_map": device_map if device_map is not None else device, "dtype": dtype,
            "torch_dtype": torch_dtype, "revision": revision, "token": token, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        door = AutoModelForSeq2SeqLM if TASKS.get(task or "", False) else AutoModelForCausalLM
        arguments = {**{k: v for k, v in said.items() if v is not None}, **(model_kwargs or {})}
        loaded = door.from_pretrained(model, **arguments)
    else:
        loaded = model if device is None else model.to(device)
    named = tokenizer if tokenizer is not None else loaded.name_or_path
    if isinstance(named, str | Path):
        named = AutoTokenizer.from_pretrained(named, **({"revision": revision} if revision and named == model else {}))
    return TextGenerationPipeline(loaded, named, **settings)


class TextGenerationPipeline:
    """Generates text. Rows of a batch are padded on the left, whatever the tokenizer's side.

    Args:
        **settings: of every call, over those of the model.
    """

    def __init__(self, model: HFModel, tokenizer: PreTrainedTokenizer, **settings: Any) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    @property
    def device(self) -> Any:
        """Of the model."""
        return self.model.device

    def __call__(self, text_inputs: Any, **settings: Any) -> Any:
        """Generate.

        Args:
            text_inputs: a text, a chat (messages with role and content), or a list of either.
            **settings: return_full_text (default: True), batch_size, and what `generate` takes.
        Returns: [{"generated_text": text}] for one prompt, with a chat the messages and the answer; a list of these for
            a list.
        """
        given = {k: v for k, v in {**self.settings, **settings}.items() if v is not None}
        for name in _REFUSED:
            if name in given:
                raise unsupported(name, given[name], "a pipeline here gives text for text.",
                                  "Use tokenizer and generate.")  # fmt: skip
        single, prompts = _prompts(text_inputs)
        full, size = given.pop("return_full_text", True), given.pop("batch_size", len(prompts))
        merged = {**self._defaults(given), **given}
        found: list[list[dict[str, Any]]] = []
        for start in range(0, len(prompts), size):
            found += self._batch(prompts[start : start + size], full, merged)
        return found[0] if single else found

    def _defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The task's defaults that neither the call nor the model's files speak about."""
        said = {**self.model.generation_config.to_diff_dict(), **given}
        if "generation_config" in given:
            said.update(given["generation_config"].to_diff_dict())
        task = "text2text-generation" if self.model.SEQ2SEQ else "text-generation"
        kept = {k: v for k, v in DEFAULTS[task].items() if k not in said}
        if "max_length" in given:
            kept.pop("max_new_tokens", None)
        if said.get("do_sample") is False:
            kept.pop("temperature", None)
        return kept

    def _batch(
        self, prompts: Sequence[Any], full: bool, settings: Mapping[str, Any]
    ) -> list[list[dict[str, Any]]]:  # fmt: skip
        tokenizer = self.tokenizer
        rows = [
            tokenizer.encode(prompt) if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in prompts
        ]  # fmt: skip
        pad = {} if len({len(row) for row in rows}) == 1 else {"padding": True}
        encoded = tokenizer.pad({"input_ids": rows}, padding=bool(pad), padding_side="left", return_tensors="pt")
        made = self.model.generate(**encoded.to(self.model.device), tokenizer=tokenizer, **settings)
        sequences = made if hasattr(made, "shape") else made.sequences
        copies = sequences.shape[0] // len(prompts)
        start = 0 if self.model.SEQ2SEQ else encoded["input_ids"].shape[1]
        texts = tokenizer.batch_decode(sequences[:, start:], skip_special_tokens=True)
        return [
            [{"generated_text": self._answer(prompt, texts[row * copies + i], full)} for i in range(copies)]
            for row, prompt in enumerate(prompts)
        ]

    def _answer(self, prompt: Any, text: str, full: bool) -> Any:
        if self.model.SEQ2SEQ:
            return text
        if isinstance(prompt, str):
            return text if not full else prompt + text
        answer = {"role": "assistant", "content": text}
        return text if not full else [*prompt, answer]


def _prompts(given: Any) -> tuple[bool, list[Any]]:
    """Whether there is one, and all of them."""
    if isinstance(given, str):
        return True, [given]
    if isinstance(given, Sequence) and given:
        if isinstance(given[0], Mapping):
            if given[-1].get("role") == "assistant":
                raise unsupported("text_inputs", "…", "the chat ends with an answer, and a template renders it whole.",
                                  "End it with a user's message.")  # fmt: skip
            return True, [list(given)]
        if all(isinstance(p, str) for p in given) or all(isinstance(p, Sequence) for p in given):
            return False, [p if isinstance(p, str) else list(p) for p in given]
    raise InputError(f"a prompt cannot be made of {type(given).__name__}.",
                     fix="Pass a text, a list of messages, or a list of these.", argument="text_inputs")  # fmt: skip
