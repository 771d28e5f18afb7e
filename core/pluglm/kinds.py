"""The kinds of plugin: their entry-point groups, their hooks, and the version of each kind's API.

A kind's version is raised when its hook or the objects behind it change: the minor number for an addition that an
older plugin need not know of, the major number for anything else. Versions of different kinds are independent of each
other and of the release. A plugin states the range it was written for in its `pluglm.json`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One extension point.

    Attributes:
        name: what users type before a slash, singular ("attention").
        group: the entry-point group that announces its providers ("pluglm.attention").
        hooks: names of the hooks a provider implements; the first one builds. Empty: providers are discovered, listed
            and governed, but this release has no contract for them yet and refuses to use one.
        version: "major.minor" of the contract.
        purpose: one line for `pluglm plugins`.
    """

    name: str
    group: str
    hooks: tuple[str, ...]
    version: str
    purpose: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("architecture", "pluglm.architectures", ("pluglm_build_model", "pluglm_describe_model"), "1.3",
             "reads a model type's config and builds its module"),
        Kind("attention", "pluglm.attention", ("pluglm_build_attention",), "1.1",
             "computes attention and builds the masks it needs"),
        Kind("cache", "pluglm.caches", ("pluglm_build_cache",), "2.0",
             "keeps keys, values and states between forward passes"),
        Kind("quantizer", "pluglm.quantizers", ("pluglm_build_quantizer",), "1.3",
             "replaces linear layers by smaller ones"),
        Kind("decoding", "pluglm.decoding", ("pluglm_build_decoding",), "1.3",
             "chooses the next tokens"),
        Kind("kernel", "pluglm.kernels", ("pluglm_load_kernel",), "1.0",
             "computes one operation faster than its reference"),
        Kind("executor", "pluglm.executors", ("pluglm_build_executor",), "1.1",
             "runs a built model, one forward pass a call"),
        Kind("source", "pluglm.sources", ("pluglm_build_source",), "1.0",
             "finds a checkpoint's files by name"),
        Kind("format", "pluglm.formats", ("pluglm_build_format",), "1.0",
             "reads a checkpoint's files"),
        Kind("tokenizer", "pluglm.tokenizers", ("pluglm_build_tokenizer",), "1.1",
             "turns text into token ids and back"),
        Kind("constraint", "pluglm.constraints", ("pluglm_build_constraint",), "1.0",
             "restricts what may be generated"),
        Kind("adapter", "pluglm.adapters", (), "0.1",
             "changes a built model, as LoRA does"),
        Kind("engine", "pluglm.engines", (), "0.1",
             "serves many requests with one model"),
        Kind("command", "pluglm.commands", ("pluglm_build_command",), "1.0",
             "adds a sub-command to the command line"),
        Kind("hooks", "pluglm.hooks", (), "1.0",
             "observes and governs: configure, check_policy, rank, plan_ready, audit"),
    )
}  # fmt: skip

GROUPS: dict[str, str] = {kind.group: kind.name for kind in KINDS.values()}
