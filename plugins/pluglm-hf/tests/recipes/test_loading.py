"""Modules of a recipe: what they import, who sees them, and what is said when they fail."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import pytest
from pluglm_hf.recipes.facade import SERVED, RecipeImportError, tree
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.loading import Recipe, load_recipe

Load = Callable[..., Recipe]


def test_helpers_are_imported_by_their_names_in_every_form(load: Load) -> None:
    text = (
        "from . import first\nfrom .second import two as zwei\nfrom .second import *\n"
        "def generate(model):\n    from .third import three\n    return first.one + zwei + two + three\n"
    )
    recipe = load(text, first="from .second import two\none = two - 1", second="two = 2", third="three = 3")
    assert recipe.function(None) == 1 + 2 + 2 + 3


def test_two_recipes_with_a_helper_of_one_name_have_one_each(load: Load) -> None:
    text = "from .helper import value\ndef generate(model): return value"
    assert [load(text, helper=f"value = {i}").function(None) for i in (1, 2)] == [1, 2]


def test_no_module_of_a_recipe_stands_under_a_public_name(load: Load) -> None:
    before = set(sys.modules)
    load("from .helper import x\ndef generate(model): return x", helper="x = 1")
    new = {name for name in set(sys.modules) - before if not name.startswith("pluglm")}
    assert new and all(name.startswith("_pluglm_recipe_") for name in new)
    assert "generate" not in sys.modules and "helper" not in sys.modules


def test_every_name_that_is_served_is_there() -> None:
    for module, names in SERVED.items():
        for name in names:
            assert getattr(tree()[module], name) is not None


def test_only_a_recipe_sees_the_small_package(load: Load) -> None:
    before = sys.modules.get("transformers")
    recipe = load(
        "import transformers\nimport transformers.generation.utils as u\nfrom transformers.generation import utils\n"
        "from transformers.utils import logging\nlogging.get_logger(__name__).warning_once('')\n"
        "from transformers import GenerationMixin\n"
        "def generate(model):\n"
        "    from transformers import LogitsProcessorList as L\n"
        "    return transformers.__version__, u.GenerationMixin is GenerationMixin is utils.GenerationMixin, L"
    )
    version, same, processors = recipe.function(None)
    assert tuple(map(int, version.split(".")[:2])) >= (5, 3)
    assert same
    assert processors.__module__ == "pluglm_hf.processors"
    assert sys.modules.get("transformers") is before


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("from transformers import AutoModelForCausalLM", "AutoModelForCausalLM"),
        ("from transformers.generation.utils import GenerationMixin, NoSuch", "NoSuch"),
        ("import transformers.integrations.fsdp", "transformers.integrations.fsdp"),
        ("from transformers.models.llama import LlamaModel", "transformers.models.llama"),
    ],
)
def test_a_name_that_is_not_served_is_a_typed_import_error(line: str, missing: str, load: Load) -> None:
    with pytest.raises(RecipeImportError, match="is not served to recipes") as caught:
        load(f"{line}\ndef generate(model): pass")
    assert isinstance(caught.value, ImportError)
    assert missing in caught.value.what
    assert "GenerationMixin" in caught.value.why or "transformers.generation.utils" in caught.value.why


def test_an_import_that_is_optional_may_fail(load: Load) -> None:
    recipe = load(
        "try:\n    from transformers import HybridCache\nexcept ImportError:\n    HybridCache = None\n"
        "def generate(model): return HybridCache"
    )
    assert recipe.function(None) is None


@pytest.mark.parametrize(
    ("text", "message", "why"),
    [
        ("def generat(model): pass", "`mine` defines no function `generate`", "is run"),
        ("def generate(model: pass", "generate.py is no Python", "line 1"),
        ("import no_such_package\ndef generate(model): pass", "failed while it was loaded", "no_such_package"),
        (
            "from .absent import x\ndef generate(model): pass",
            "imports .absent, which is not there",
            "there is generate",
        ),
        ("from .helper import y\ndef generate(model): pass", "imports y from .helper", "does not define it"),
        ("from ..other import y\ndef generate(model): pass", "imports ..other", "beside generate.py"),
        ("def generate(): pass", "generate takes no model", "first parameter"),
    ],
)
def test_a_recipe_that_cannot_be_loaded_says_why(text: str, message: str, why: str, load: Load) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(text, helper="x = 1")
    assert why in caught.value.why
    assert caught.value.fix


def test_a_folder_without_the_file_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match=r"`x` has no custom_generate/generate\.py"):
        load_recipe({}, "x")


def test_a_traceback_shows_the_lines_of_a_recipe(load: Load) -> None:
    recipe = load("from .helper import work\ndef generate(model):\n    return work(model)",
                  helper="def work(model):\n    return model.no_such_thing")  # fmt: skip
    with pytest.raises(AttributeError) as caught:
        recipe.function(object())
    shown = "".join(traceback.format_exception(caught.value))
    assert "<recipe mine>/custom_generate/helper.py" in shown
    assert "return model.no_such_thing" in shown


def test_a_module_that_failed_is_run_again_by_the_next_attempt(load: Load) -> None:
    with pytest.raises(RecipeError, match="failed while it was loaded"):
        load("from .helper import x\ndef generate(model): return x", helper="1 / 0")
    assert load("from .helper import x\ndef generate(model): return x", helper="x = 5").function(None) == 5


def test_requirements_are_read_as_pep_508_says(load: Load) -> None:
    text = "def generate(model): return 1"
    met = 'pytest >= 7  # with spaces\n\ntorch>=2.0,!=2.1.*\nno-such; python_version < "3"\npackaging[x]>1'
    assert load(text, requirements=met).function(None) == 1
    with pytest.raises(RecipeError, match="Missing requirements") as caught:
        load(text, requirements="no-such-package\npytest<1\n-r other.txt")
    lines = caught.value.missing
    assert lines[0] == "no-such-package (installed: None)"
    assert lines[1] == f"pytest<1 (installed: {pytest.__version__})"
    assert lines[2].startswith("-r other.txt (not understood:")


def test_what_a_recipe_can_read_is_known_from_its_text(load: Load) -> None:
    recipe = load(
        "from .helper import rate\ndef generate(model, own=1, **kwargs):\n"
        "    return kwargs.get('pad_token'), model.generation_config.evolution_rate, rate(kwargs)",
        helper="def rate(kwargs): return kwargs['rate_of_helper']",
    )
    assert {"own", "pad_token", "evolution_rate", "rate_of_helper"} <= recipe.names
    assert "pad_tokn" not in recipe.names
