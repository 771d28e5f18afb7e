"""`AutoConfig`, `AutoModelFor…` and `AutoTokenizer`: doors without a room of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pluglm.errors import InputError
from pluglm_hf.loading import find_folder, open_model, read_wishes
from pluglm_hf.model_config import PretrainedConfig
from pluglm_hf.refusals import unknown

if TYPE_CHECKING:
    from pluglm_hf.model import HFModel
    from pluglm_hf.tokenizer import PreTrainedTokenizer


class _Door:
    """Not made by itself, as in the reference."""

    def __init__(self) -> None:
        raise InputError(
            f"{type(self).__name__} has no instances.",
            fix=f'Use {type(self).__name__}.from_pretrained("folder-or-org/name").',
        )

    @classmethod
    def from_config(cls, *args: Any, **arguments: Any) -> NoReturn:  # noqa: ARG003 - refused whatever they are
        """Refused: weights that nobody trained are no model to generate with."""
        raise InputError(
            f"{cls.__name__}.from_config cannot be honoured.", why="it would make a model of random weights.",
            fix="Use from_pretrained.", argument="config",
        )  # fmt: skip


class AutoConfig(_Door):
    """config.json of a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> PretrainedConfig:
        """Read it, weights unread. arguments: revision, token, local_files_only."""
        loader = open_model(pretrained_model_name_or_path, arguments)
        return PretrainedConfig(loader.checkpoint.config, loader.context.description)


class _AutoModel(_Door):
    SEQ2SEQ = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *further: Any, **arguments: Any) -> HFModel:
        """Load a model. The README's table says what becomes of each argument.

        Raises: InputError, UnsupportedRequestError; what `pluglm.load` raises.
        """
        from pluglm_hf.model import PreTrainedModel
        from pluglm_hf.seq2seq_model import PreTrainedSeq2SeqModel

        if further:
            raise InputError("from_pretrained takes one positional argument, the model.",
                             fix="Pass the others by name.", argument="model")  # fmt: skip
        kind = PreTrainedSeq2SeqModel if cls.SEQ2SEQ else PreTrainedModel
        return kind(read_wishes(pretrained_model_name_or_path, arguments))


class AutoModelForCausalLM(_AutoModel):
    """A decoder-only model."""


class AutoModelForSeq2SeqLM(_AutoModel):
    """An encoder-decoder."""

    SEQ2SEQ = True


class AutoTokenizer(_Door):
    """The tokenizer of a model's folder."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> PreTrainedTokenizer:
        """Read it.

        Args:
            **arguments: revision, token, local_files_only; padding_side, truncation_side, pad_token, eos_token,
                bos_token, model_max_length; use_fast=True and legacy, which mean nothing here: there is one kind.
        """
        from pluglm_hf.tokenizer import SETTINGS, PreTrainedTokenizer, build_tokenizer

        folder, rest = find_folder(pretrained_model_name_or_path, arguments)
        if rest.pop("use_fast", True) is False:
            raise InputError("use_fast=False cannot be honoured.", why="tokenizer.json is read, by the fast library.",
                             fix="Leave it out.", argument="use_fast")  # fmt: skip
        for name in rest:
            if name not in SETTINGS:
                raise unknown("AutoTokenizer.from_pretrained", name, SETTINGS)
        return PreTrainedTokenizer(
            build_tokenizer(folder), folder=folder, name=str(pretrained_model_name_or_path), **rest
        )
