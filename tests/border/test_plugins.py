"""Third-party plugins of many kinds: built as wheels, installed with pip, chosen by name, used, and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import border_kit
import pytest

IDS = {
    "acme-architecture:architecture/acme-tiny", "acme-attention:attention/groups", "acme-cache:cache/chunks",
    "acme-decoding:decoding/banned", "acme-quantizer:quantizer/rows8", "acme-extras:executor/counting",
    "acme-extras:kernel/norm", "acme-extras:source/acme-zoo", "acme-extras:tokenizer/letters",
}  # fmt: skip
LAYERS, NEW = 2, 12


@pytest.fixture(scope="module")
def told(site: Path, llama: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything, in one process."""
    packed = str(tmp_path_factory.mktemp("saved") / "packed")

    def load(model: Path | str = llama, ids: Any = border_kit.PROMPT, **arguments: Any) -> dict[str, Any]:
        return border_kit.scene("load", [site], model=str(model), ids=ids, **arguments)

    return border_kit.play(
        {
            "alone": border_kit.scene("load", [], model=str(llama), ids=border_kit.PROMPT),
            "auto": load(),
            "attention": load(attention="groups"),
            "cache": load(cache="chunks"),
            "both, with padding": load(
                attention="groups", cache="chunks", ids=[border_kit.PROMPT, [9, 4]], decoding="greedy"
            ),
            "decoding": load(decoding="banned"),
            "quantizer": load(quantizer="rows8", save=packed),
            "packed": load(model=packed),
            "executor": load(executor="counting"),
            "tokenizer": load(tokenizer="letters", ids="hello"),
            "source": load(model="acme-zoo"),
            "architecture": load(model=tiny, ids=[3, 17, 5]),
            "architecture, other parts": load(
                model=tiny, ids=[3, 17, 5], attention="groups", cache="chunks", executor="counting"
            ),
            "by id": load(attention="acme-attention:attention/groups"),
            **{
                f"option of {kind}": load(**{kind: name}, options={kind: {"no_such_option": 1}})
                for kind, name in NAMED.items()
            },
        },
        ACME_ZOO=str(llama),
    )


NAMED = {"attention": "groups", "cache": "chunks", "decoding": "banned", "quantizer": "rows8"}


def test_each_is_listed_without_importing_one_of_them_or_torch(site: Path) -> None:
    results = border_kit.play(
        {
            name: border_kit.scene("cli", [site], arguments=["plugins", *arguments])
            for name, arguments in {
                "list": ["list", "--json"], "doctor": ["doctor"], "why": ["why", "attention"],
                "info": ["info", "groups"],
            }.items()
        }
    )  # fmt: skip
    rows = {row["id"]: row for row in json.loads(results["list"]["out"])["plugins"]}
    assert rows.keys() >= IDS
    assert {(rows[i]["version"], rows[i]["state"]) for i in IDS} == {("2.1", "enabled")}
    assert "acme-attention:attention/groups" in results["why"]["out"]
    assert "one einsum for each key-value head" in results["info"]["out"]
    for name, result in results.items():
        assert (name, result["code"], result["imported"], result["torch"]) == (name, 0, [], False), result


def test_auto_passes_over_plugins_of_a_lower_tier_and_says_so(told: dict[str, Any]) -> None:
    auto, alone = told["auto"], told["alone"]
    for kind in ("attention", "cache", "decoding"):
        assert auto["parts"][kind] == alone["parts"][kind]
    assert auto["tokens"] == alone["tokens"]
    assert auto["rejected"]["acme-attention:attention/groups"] == ["next in line"]
    assert auto["rejected"]["acme-decoding:decoding/banned"] == ["used when named"]


@pytest.mark.parametrize(
    ("kind", "provider", "module", "counter", "least"),
    [
        ("attention", "acme-attention:attention/groups", "acme_attention", "attend", LAYERS * NEW),
        ("cache", "acme-cache:cache/chunks", "acme_cache", "append", LAYERS * NEW),
        ("executor", "acme-extras:executor/counting", "acme_extras", "run", NEW),
    ],
)
def test_a_part_chosen_by_name_does_the_work_and_gives_the_same_tokens(
    told: dict[str, Any], kind: str, provider: str, module: str, counter: str, least: int
) -> None:
    result = told[kind]
    assert result["parts"][kind] == provider, result
    assert result["calls"][module][counter] >= least
    assert result["tokens"] == told["alone"]["tokens"]
    assert result["logits"] == pytest.approx(told["alone"]["logits"], abs=1e-4)


def test_a_full_id_chooses_as_well(told: dict[str, Any]) -> None:
    assert told["by id"]["parts"]["attention"] == "acme-attention:attention/groups"


def test_a_kernel_is_chosen_by_auto_and_gives_the_same_tokens(told: dict[str, Any]) -> None:
    assert told["auto"]["parts"]["kernel:rms_norm"] == "acme-extras:kernel/norm"
    assert told["auto"]["calls"]["acme_extras"]["rms_norm"] >= (2 * LAYERS + 1) * NEW


def test_parts_of_two_strangers_work_together(told: dict[str, Any]) -> None:
    result = told["both, with padding"]
    assert result["calls"]["acme_attention"]["attend"] >= LAYERS * NEW
    assert result["calls"]["acme_cache"]["append"] >= LAYERS * NEW
    assert result["tokens"] == told["alone"]["tokens"], "a padded neighbour must not change a row"


def test_a_strategy_is_used_and_its_tokens_come_back(told: dict[str, Any]) -> None:
    assert told["decoding"]["calls"]["acme_decoding"]["chosen"] == NEW
    assert told["decoding"]["tokens"] == told["alone"]["tokens"]


def test_a_quantizer_packs_while_loading_and_reads_what_it_saved(told: dict[str, Any]) -> None:
    result, packed = told["quantizer"], told["packed"]
    assert result["calls"]["acme_quantizer"]["quantize"] == 7 * LAYERS
    assert result["calls"]["acme_quantizer"]["forward"] >= 7 * LAYERS * NEW
    assert result["tokens"][:3] == told["alone"]["tokens"][:3]
    assert packed["parts"]["quantizer"] == "acme-quantizer:quantizer/rows8"
    assert packed["calls"]["acme_quantizer"]["unpack"] == 7 * LAYERS
    assert packed["calls"]["acme_quantizer"].get("quantize", 0) == 0
    assert packed["tokens"] == result["tokens"]


def test_an_architecture_brings_its_own_module(told: dict[str, Any]) -> None:
    own, other = told["architecture"], told["architecture, other parts"]
    assert own["parts"]["architecture"] == "acme-architecture:architecture/acme-tiny", own
    assert own["calls"]["acme_architecture"]["forward"] >= NEW
    assert other["parts"]["cache"] == "acme-cache:cache/chunks"
    assert other["tokens"] == own["tokens"]


def test_a_source_and_a_tokenizer_are_used(told: dict[str, Any]) -> None:
    assert told["source"]["calls"]["acme_extras"]["resolve"] == 1
    assert told["source"]["tokens"] == told["alone"]["tokens"]
    letters = "".join(chr(ord("a") + i) for i in told["tokenizer"]["tokens"])
    assert told["tokenizer"]["text"] == letters


@pytest.mark.parametrize("kind", NAMED)
def test_an_option_that_a_plugin_does_not_know_is_refused(told: dict[str, Any], kind: str) -> None:
    result = told[f"option of {kind}"]
    assert result["error"] == "UnsupportedRequestError", result
    assert "no_such_option" in result["message"]
