"""What every test of the repository gets: no network, no configuration of the user's, the same examples each time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Derandomized: a failure is the same on every machine, and a red build is never luck. No deadline: machines differ.
settings.register_profile("pluglm", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("pluglm")


class NetworkRefusedError(RuntimeError):
    """A test without the mark `network` reached for another host."""


def is_local(address: Any) -> bool:
    """Whether an address stays on this machine: a Unix socket, or loopback."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    return host in ("localhost", "::1") or host.startswith("127.")


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other hosts, unless the test bears the mark `network`."""
    if request.node.get_closest_marker("network"):
        return

    def guarded(connect: Any) -> Any:
        def refuse_or_connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address):
                raise NetworkRefusedError(f"a test connects to {address!r}: mark it `network`, or serve on loopback.")
            return connect(self, address)

        return refuse_or_connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep caches and settings of the person who runs the tests out of them, and the tests out of theirs."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PLUGLM_", "HF_", "HUGGING_FACE_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("HF_HOME", str(home / "huggingface"))
        patch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
        yield home


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what bears the mark `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
