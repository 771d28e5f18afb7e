"""The command is announced, built and listed without importing what it works with."""

from __future__ import annotations

import subprocess
import sys

import click
import pluglm_vendor


def test_the_hook_gives_a_click_command() -> None:
    command = pluglm_vendor.pluglm_build_command()
    assert isinstance(command, click.Command)
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--name", "--out", "--install", "--with-deps", "--yes", "--token", "--json"} < options


def test_importing_the_package_imports_neither_torch_nor_the_hub_client_nor_click() -> None:
    code = (
        "import sys, pluglm_vendor; "
        "print([n for n in ('torch', 'huggingface_hub', 'click', 'packaging') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_itself_imports_no_torch_and_asks_for_the_hub_client_only_to_fetch() -> None:
    code = "import sys, pluglm_vendor.command; print([n for n in ('torch', 'huggingface_hub') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
