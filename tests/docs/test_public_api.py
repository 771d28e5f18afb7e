"""The names that `pluglm` offers: sorted, all there, all documented by a docstring, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pluglm
from pluglm import errors


def test_public_names_are_sorted_and_complete() -> None:
    assert pluglm.__all__ == sorted(pluglm.__all__)
    assert len(set(pluglm.__all__)) == len(pluglm.__all__)
    assert set(pluglm.__all__) == {*pluglm._HOMES, "__version__"} and dir(pluglm) == pluglm.__all__


@pytest.mark.parametrize("name", pluglm.__all__)
def test_each_public_name_is_there(name: str) -> None:
    value = getattr(pluglm, name)
    assert value is not None
    if name not in ("__version__", "hookimpl"):
        assert value.__doc__ and value.__name__ == name


def test_every_exception_is_public() -> None:
    raised = {
        name for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PluglmError)
    }  # fmt: skip
    assert raised <= set(pluglm.__all__)
    for name in raised:  # the tree in the module's docstring is the tree
        assert f" {name} " in f"{errors.__doc__} ".replace("\n", " ")


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; public names: .*load"):
        _ = pluglm.lod  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert pluglm.__version__ == version("pluglm")


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after `code`."""
    program = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    return set(done.stdout.split())


def plugin_modules() -> set[str]:
    from pluglm.registry import Registry

    return {p.target.partition(":")[0].partition(".")[0] for p in Registry.installed().providers}


@pytest.mark.parametrize(
    "code",
    ["import pluglm", "from pluglm import hookimpl, InputError", "from pluglm import Plan", "import pluglm.cli.main"],
)
def test_importing_loads_no_torch_and_no_plugin(code: str) -> None:
    loaded = loaded_by(code)
    assert not loaded & {"torch", "safetensors", "huggingface_hub", "tokenizers", *plugin_modules()}
