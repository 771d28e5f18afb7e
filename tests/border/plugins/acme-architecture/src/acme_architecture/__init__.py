"""Architecture `acme-tiny`: a module of its own, no program. `CALLS` counts, for the tests."""

from collections import Counter

from pluglm import ConfigReader, hookimpl
from pluglm.contracts import AttentionSpec, KVSlot, ModelDescription, WeightMap, rules

CALLS = Counter()
WEIGHTS = {
    "embed": "embed.weight",
    "places": "places.weight",
    "head": "head.weight",
    "layer.{}.qkv": "layers.{}.qkv.weight",
    "layer.{}.out": "layers.{}.out.weight",
    "layer.{}.up": "layers.{}.up.weight",
    "layer.{}.down": "layers.{}.down.weight",
}


@hookimpl
def pluglm_describe_model(config):
    reader = ConfigReader(config)
    V, C, H, L, P = (reader.take(name, int) for name in ("vocab", "width", "heads", "depth", "places"))
    spec = AttentionSpec(H, H, C // H, C // H, (C // H) ** -0.5)
    slot = KVSlot(H, C // H, C // H)
    report = reader.finish()
    return ModelDescription(
        "acme-tiny",
        None,
        WeightMap(tuple(rules(WEIGHTS, layers=range(L)))),
        V,
        C,
        L,
        P,
        (spec,),
        (slot,) * L,
        used=report.used,
        ignored=report.ignored,
    )


@hookimpl
def pluglm_build_model(config, parts):
    from acme_architecture.tiny import Tiny

    return Tiny(config, parts)
