"""What the package says of itself is what its strategies do."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys

import pluglm_decoding_contrastive
import pytest

from pluglm.contracts import DecodingRequest
from pluglm.errors import UnsupportedRequestError
from pluglm.manifest import parse_manifest

FACTS = json.loads((importlib.resources.files(pluglm_decoding_contrastive) / "pluglm.json").read_text("utf-8"))


@pytest.mark.parametrize("facts", FACTS["providers"], ids=lambda facts: facts["name"])
def test_the_facts_name_the_fields_and_operations_that_are_used(facts: dict[str, object]) -> None:
    parse_manifest(FACTS, "pluglm.json")
    provider = getattr(pluglm_decoding_contrastive, str(facts["name"]).replace("-", "_"))
    strategy = provider.pluglm_build_decoding(request=DecodingRequest(23, "cpu", None))
    assert strategy.name == facts["name"]
    assert sorted(strategy.fields) == facts["features"]
    assert sorted(strategy.needs) == facts.get("needs", [])


def test_a_variant_is_refused() -> None:
    with pytest.raises(UnsupportedRequestError, match="variant 'wide' is not known"):
        pluglm_decoding_contrastive.dola.pluglm_build_decoding(request=DecodingRequest(23, "cpu", None, variant="wide"))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pluglm_decoding_contrastive as p; p.dola; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
