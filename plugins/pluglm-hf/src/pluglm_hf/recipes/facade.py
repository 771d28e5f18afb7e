"""A small package named `transformers` that only a recipe's own modules see.

It has the names that recipes import, over this package. `sys.modules` is not touched: other code gets the package that
is installed, if one is.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

from pluglm_hf.recipes.failures import RecipeError

#: What recipes that ask for a version are told: the release whose contracts are kept. Loops branch at 5.3.
VERSION = "5.23.0"
ROOT = "transformers"


class RecipeImportError(RecipeError, ImportError):
    """A recipe imports what is not served to it. `.module`, `.missing`."""


def _homes(module: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), module)


_PROCESSORS = {
    **_homes("pluglm_hf.processors", """
        LogitsProcessor LogitsProcessorList EncoderNoRepeatNGramLogitsProcessor
        EncoderRepetitionPenaltyLogitsProcessor ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor
        ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor
        MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
        PrefixConstrainedLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
        SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor"""),
    **_homes("pluglm_hf.warpers", """
        EpsilonLogitsWarper EtaLogitsWarper MinPLogitsWarper TemperatureLogitsWarper TopHLogitsWarper TopKLogitsWarper
        TopPLogitsWarper TypicalLogitsWarper"""),
}  # fmt: skip
_CRITERIA = _homes("pluglm_hf.criteria", """
    ConfidenceCriteria EosTokenCriteria MaxLengthCriteria MaxTimeCriteria StopStringCriteria StoppingCriteria
    StoppingCriteriaList validate_stopping_criteria""")  # fmt: skip
_OUTPUTS = _homes("pluglm_hf.outputs", """
    GenerateBeamDecoderOnlyOutput GenerateBeamEncoderDecoderOutput GenerateDecoderOnlyOutput
    GenerateEncoderDecoderOutput""")  # fmt: skip
_UNIONS = _homes("pluglm_hf.outputs", "GenerateBeamOutput GenerateNonBeamOutput GenerateOutput")
_CACHES = {
    "Cache": "pluglm_hf.cache_face:CacheFace",
    **_homes("pluglm_hf.caches", "DynamicCache QuantizedCache StaticCache"),
    "EncoderDecoderCache": "pluglm_hf.encoder_decoder_cache",
}
_CONFIG = {"GenerationConfig": "pluglm_hf.recipes.config:RecipeConfig"}
_MIXIN = {"GenerationMixin": "pluglm_hf.recipes.handoff"}
_STREAMERS = _homes("pluglm_hf.streamers", "AsyncTextIteratorStreamer BaseStreamer TextIteratorStreamer TextStreamer")
_MODEL = {"PreTrainedModel": "pluglm_hf.surface:GenerationSurface"}
_PASS = {"CausalLMOutputWithPast": "pluglm_hf.outputs"}
_OUTPUT = {"ModelOutput": "pluglm_hf.outputs:Results"}
_TOKENIZER = {
    "PreTrainedTokenizer": "pluglm_hf.tokenizer", "PreTrainedTokenizerFast": "pluglm_hf.tokenizer:PreTrainedTokenizer",
    "PreTrainedTokenizerBase": "pluglm_hf.tokenizer:PreTrainedTokenizer",
}  # fmt: skip
_GENERATION = {**_PROCESSORS, **_CRITERIA, **_OUTPUTS, **_CONFIG, **_MIXIN, **_STREAMERS}

#: Module -> name -> where it is, "module" or "module:its name there".
SERVED: Mapping[str, Mapping[str, str]] = {
    "transformers": {**_GENERATION, **_CACHES, **_MODEL, **_TOKENIZER},
    "transformers.cache_utils": _CACHES,
    "transformers.generation": _GENERATION,
    "transformers.generation.configuration_utils": _CONFIG,
    "transformers.generation.logits_process": _PROCESSORS,
    "transformers.generation.stopping_criteria": _CRITERIA,
    "transformers.generation.streamers": _STREAMERS,
    "transformers.generation.utils": {**_GENERATION, **_UNIONS, **_CACHES, **_OUTPUT, **_PASS},
    "transformers.modeling_outputs": _PASS,
    "transformers.modeling_utils": _MODEL,
    "transformers.tokenization_utils_base": _TOKENIZER,
    "transformers.utils": _OUTPUT,
    "transformers.utils.generic": _OUTPUT,
    "transformers.utils.logging": {"get_logger": "pluglm_hf.recipes.facade"},
}
#: Below these, the installed package answers for what is not served: nothing there reaches the model.
_HARMLESS = "transformers.utils"


class OnceLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger with `warning_once` and `info_once`."""

    @lru_cache(maxsize=1024)  # noqa: B019 - a logger lives as long as the process
    def warning_once(self, message: str) -> None:
        """Once for each text."""
        self.warning(message)

    @lru_cache(maxsize=1024)  # noqa: B019 - as above
    def info_once(self, message: str) -> None:
        """Once for each text."""
        self.info(message)


def get_logger(name: str | None = None) -> OnceLogger:
    """The logger of a recipe's module."""
    return OnceLogger(logging.getLogger(name or ROOT), {})


class _Served(ModuleType):
    """One module of the package; a name is looked up when it is first used."""

    def __getattr__(self, name: str) -> Any:
        home = SERVED[self.__name__].get(name)
        if home is None:
            if not name.startswith("__") and self.__name__.startswith(_HARMLESS):
                real = _installed(self.__name__)
                if real is not None and hasattr(real, name):
                    return getattr(real, name)
            raise AttributeError(f"module {self.__name__!r} serves no {name!r} to recipes")
        place, _, there = home.partition(":")
        value = getattr(importlib.import_module(place), there or name)
        setattr(self, name, value)
        return value


@lru_cache(maxsize=1)
def tree() -> Mapping[str, ModuleType]:
    """The modules by name, each an attribute of the one above."""
    made: dict[str, ModuleType] = {name: _Served(name) for name in SERVED}
    for name, module in made.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
        module.__package__ = name if any(other.startswith(name + ".") for other in made) else parent
    vars(made[ROOT])["__version__"] = VERSION
    return made


def serving(relative: Callable[[str, Sequence[str]], ModuleType]) -> Mapping[str, Any]:
    """The builtins of a recipe's modules: as usual, but `import` finds this package, and the recipe's own files.

    Args:
        relative: ("helper" or "", names to import from it) -> the module for `from .helper import …`.
    """

    def find(
        name: str, globals: Mapping[str, Any] | None = None, locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (), level: int = 0,
    ) -> ModuleType:  # fmt: skip
        if level:
            return relative("." * (level - 1) + name, fromlist or ())
        if name != ROOT and not name.startswith(ROOT + "."):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        module = _find(name)
        for wanted in fromlist or ():
            if wanted != "*" and not hasattr(module, wanted):
                raise _unserved(name, wanted)
        return module if fromlist else tree()[ROOT]

    return {**vars(builtins), "__import__": find}


def _find(name: str) -> ModuleType:
    served = tree().get(name)
    if served is not None:
        return served
    real = _installed(name) if name.startswith(_HARMLESS + ".") else None
    if real is None:
        raise _unserved(name, "")
    # `import transformers.utils.x` is looked up from the top afterwards.
    setattr(tree()[_HARMLESS], name.removeprefix(_HARMLESS + ".").partition(".")[0], real)
    return real


def _installed(name: str) -> ModuleType | None:
    """A module of the installed package, None if there is none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _unserved(module: str, name: str) -> RecipeImportError:
    names = ", ".join(sorted(SERVED.get(module, ())))
    return RecipeImportError(
        f"the recipe imports {name + ' from ' if name else ''}{module}, which is not served to recipes.",
        why="a recipe runs on pluglm; of transformers it gets what decoding methods import: "
        + (f"of {module}: {names}." if names else f"the modules {', '.join(sorted(SERVED))}."),
        fix="Ask for the name to be added, or write the method as a decoding plugin (`pluglm new decoding`).",
        module=module, missing=name,
    )  # fmt: skip
