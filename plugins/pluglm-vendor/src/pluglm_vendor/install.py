"""Puts a wheel into this environment, with this interpreter's own pip; and refuses names that are taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pluglm.errors import PluginConflictError, PluginError
from pluglm.vendored import installed_records
from pluglm_vendor.bundle import Bundle


def check_name(bundle: Bundle, name: str) -> str | None:
    """The installed version that the wheel would replace, or None if there is none.

    Another commit of the same repository may take its predecessor's place; nothing else may.

    Raises: PluginConflictError.
    """
    from pluglm.discovery import discover

    kind = bundle.kind
    own = f"{bundle.distribution(name)}:{kind}/{name}"
    replaced = None
    for provider in discover().providers:
        if provider.kind != kind or provider.name != name:
            continue
        repo = installed_records(kind, bundle.record_name).get(provider.id, {}).get("repo")
        if provider.id != own or repo != bundle.repo:
            made = f", vendored from {repo}" if repo else ""
            raise PluginConflictError(
                f"{kind} {name!r} is provided already, by {provider.id} {provider.version}{made}.",
                why="two plugins of one name could not be told apart by it, and nothing overrides silently.",
                fix=f"Choose another with --name, or uninstall {provider.distribution} first.",
                candidates=(provider.id, own),
            )
        replaced = provider.version
    return replaced


def install(wheel: Path, *, with_deps: bool) -> None:
    """Run pip. Raises: PluginError with pip's last words if it fails."""
    # The same version may be there already, damaged: pip would see nothing to do.
    how = ["--upgrade"] if with_deps else ["--no-deps", "--no-index", "--force-reinstall"]
    pip = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *how, str(wheel)]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _failed(wheel, str(error)) from error
    if done.returncode != 0:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise _failed(wheel, "\n".join(words[-5:]) or f"pip exited with {done.returncode}")


def _failed(wheel: Path, why: str) -> PluginError:
    return PluginError(
        f"{wheel.name} was not installed.",
        why=why,
        fix=f"The wheel is at {wheel}; install it by hand once that is put right: pip install {wheel}",
        plugin=wheel.name.split("-")[0].replace("_", "-"),
    )
