"""Every exception pluglm raises on purpose.

    PluglmError
    ├── PluginError                    something about a plugin
    │   ├── PluginNotFoundError        nothing installed provides what was named
    │   ├── PluginConflictError        two distributions claim one name
    │   ├── PluginDisabledError        installed, but switched off or denied
    │   ├── IncompatiblePluginError    written for another API version
    │   ├── QuarantinedError           failed to import, build or keep its contract
    │   └── ManifestError              its pluglm.json is missing or wrong
    ├── PlanError                      the parts that were asked for do not fit together
    │   └── UnsupportedRequestError    a part cannot honour what was asked of it
    ├── ModelError                     something about a model's files
    │   ├── ModelNotFoundError         no such folder, repository or file
    │   ├── ConfigError                config.json (or a sibling) says what cannot be honoured
    │   └── CheckpointError            weights that are damaged, missing, surplus or of the wrong shape
    ├── InputError                     a prompt or an argument of a call
    │   ├── GrammarError               a grammar that is malformed or cannot be honoured, or a token that breaks one
    │   └── ContextLengthError         more tokens than the model or the cache holds
    ├── GenerationError                no token can be chosen from what the model or a processor gave
    ├── CacheError                     an operation a cache lacks or cannot do now
    └── SaveError                      nothing was written, or what was there before is intact

A message says what happened, why, and what to do. What a program needs is in attributes, not only in the text.
"""

from __future__ import annotations

from typing import Any


class PluglmError(Exception):
    """Base of every error pluglm raises on purpose.

    Args:
        what: what happened, one sentence.
        why: the cause, as far as it is known.
        fix: what the reader can do about it.
        **data: becomes attributes (`.plugin`, `.key`, `.path` …), for programs.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "", **data: Any) -> None:
        self.what, self.why, self.fix = what, why, fix
        self.data = data
        for name, value in data.items():
            setattr(self, name, value)
        lines = [what]
        if why:
            lines.append("  Why: " + why.replace("\n", "\n       "))
        if fix:
            lines.append("  To do: " + fix.replace("\n", "\n         "))
        super().__init__("\n".join(lines))

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are not set: keeps `error.plugin` usable with type checkers.
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; it carries {sorted(self.__dict__)}")


class PluginError(PluglmError):
    """Something about a plugin. `.plugin` is its id (`distribution:kind/name`) or distribution."""


class PluginNotFoundError(PluginError):
    """Nothing that is installed, enabled and compatible provides what was named. `.kind`, `.name`."""


class PluginConflictError(PluginError):
    """Two distributions claim one name (or one distribution is installed twice). `.candidates`: their ids."""


class PluginDisabledError(PluginError):
    """The plugin is installed but switched off by the user or denied by a policy hook. `.plugin`, `.by`."""


class IncompatiblePluginError(PluginError):
    """The plugin was written for another version of its kind's API. `.plugin`, `.needs`, `.have`."""


class QuarantinedError(PluginError):
    """The plugin was set aside. `.plugin`; `.stage`: import, register, build, contract; `__cause__`: what it raised."""


class ManifestError(PluginError):
    """A plugin's `pluglm.json`, or the TOML it is made from, does not follow the schema. `.path`."""


class PlanError(PluglmError):
    """The parts that were asked for do not fit together; names combinations that would."""


class UnsupportedRequestError(PlanError):
    """A part cannot honour a request. `.reasons`: every reason, not only the first."""


class ModelError(PluglmError):
    """Something about a model's files. `.path`."""


class ModelNotFoundError(ModelError):
    """No such folder, repository, revision or file. `.model`."""


class ConfigError(ModelError):
    """A JSON file beside the weights says something that cannot be honoured. `.key`, `.path`."""


class CheckpointError(ModelError):
    """Weights are damaged, missing, surplus, or of another shape or dtype. `.path`, `.tensor`."""


class InputError(PluglmError):
    """A prompt or an argument of a call is of no use. `.argument`."""


class ContextLengthError(InputError):
    """More tokens than the model or the cache holds. `.tokens`, `.limit`."""


class GrammarError(InputError):
    """A grammar is malformed, allows nothing or cannot be honoured, or a token breaks it. `.grammar`: its kind."""


class GenerationError(PluglmError):
    """No token can be chosen: scores are not finite, or every token is forbidden. `.rows`, `.step`."""


class CacheError(PluglmError):
    """A cache lacks an operation, or cannot do it in its present state. `.layout`, `.operation`."""


class SaveError(PluglmError):
    """Writing failed; what was there before is intact. `.path`."""
