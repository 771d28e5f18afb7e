"""Which build of a kernel fits, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pluglm_vendor.variants import Here, choose, here, misfit, torch_range, wheel_tag

from pluglm.errors import InputError

HOPPER = Here((2, 8), "cxx11", "cuda", (12, 8), "x86_64", "linux")
CPU = replace(HOPPER, backend="cpu", version=None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torch28-cxx11-cu128-x86_64-linux", None),
        ("torch28-cu128-x86_64-linux", None),
        ("torch28-cxx11-cu126-x86_64-linux", None),
        ("torch-universal", None),
        ("torch-cuda", None),
        ("torch28-cxx11-cu129-x86_64-linux", "it is for CUDA 12.9, and torch is built for 12.8"),
        ("torch28-cxx11-cu118-x86_64-linux", "it is for CUDA 11.8, and torch is built for 12.8"),
        ("torch210-cxx11-cu128-x86_64-linux", "it is for torch 2.10, and 2.8 is installed"),
        ("torch28-cxx98-cu128-x86_64-linux", "it has the ABI cxx98, and torch has cxx11"),
        ("torch28-cxx11-cu128-aarch64-linux", "it is for aarch64 and linux, and this is x86_64 and linux"),
        ("torch28-cu128-x86_64-windows", "it is for x86_64 and windows, and this is x86_64 and linux"),
        ("torch28-cxx11-cpu-x86_64-linux", "it is for cpu, and torch is built for cuda"),
        ("torch28-cxx11-rocm64-x86_64-linux", "it is for rocm, and torch is built for cuda"),
        ("torch-xpu", "it is for xpu, and torch is built for cuda"),
        ("tvm-ffi02-cu128-x86_64-linux", "its name does not say what it is for, in a way that is known here"),
    ],
)
def test_a_build_fits_or_it_is_said_why_not(name: str, reason: str | None) -> None:
    assert misfit(name, HOPPER) == reason


def test_compiled_for_the_newest_cuda_comes_first_and_universal_last() -> None:
    names = [
        "torch28-cxx11-cu126-x86_64-linux", "torch28-cxx11-cu128-x86_64-linux", "torch-cuda", "torch-universal",
        "torch27-cxx11-cu128-x86_64-linux",
    ]  # fmt: skip
    order = []
    while names:
        try:
            order.append(choose("org/x", reversed(names), None, HOPPER))
        except InputError:
            break
        names.remove(order[-1])
    assert order == [
        "torch28-cxx11-cu128-x86_64-linux", "torch28-cxx11-cu126-x86_64-linux", "torch-cuda", "torch-universal",
    ]  # fmt: skip


def test_without_cuda_a_build_for_the_cpu_fits() -> None:
    assert misfit("torch28-cxx11-cpu-x86_64-linux", CPU) is None
    assert misfit("torch28-cxx11-cu128-x86_64-linux", CPU) == "it is for cuda, and torch is built for cpu"


def test_a_build_that_is_named_is_taken_for_another_machine_and_an_unknown_one_refused() -> None:
    names = ["torch28-cxx11-cu128-x86_64-linux", "torch27-cxx11-cu118-x86_64-linux"]
    assert choose("org/x", names, names[1], CPU) == names[1]
    with pytest.raises(InputError, match="has no build 'torch26'") as caught:
        choose("org/x", names, "torch26", HOPPER)
    assert "torch28-cxx11-cu128-x86_64-linux: fits" in caught.value.why


def test_where_nothing_fits_every_build_is_listed_with_its_reason() -> None:
    with pytest.raises(InputError, match="no build of `org/x` fits what is installed") as caught:
        choose("org/x", ["torch28-cxx11-cu128-x86_64-linux", "torch-xpu"], None, CPU)
    assert caught.value.why == (
        "here is torch 2.8, cpu, cxx11, x86_64, linux.\n"
        "torch-xpu: it is for xpu, and torch is built for cpu\n"
        "torch28-cxx11-cu128-x86_64-linux: it is for cuda, and torch is built for cpu"
    )
    assert "--variant" in caught.value.fix


def test_the_wheel_of_a_compiled_build_is_for_its_platform_and_its_torch() -> None:
    assert torch_range("torch210-cxx11-cu128-x86_64-linux") == "==2.10.*"
    assert torch_range("torch-universal") == ""
    tags = {
        "torch28-cxx11-cu128-x86_64-linux": "py3-none-linux_x86_64",
        "torch28-metal-aarch64-darwin": "py3-none-macosx_15_0_arm64",
        "torch28-cu128-x86_64-windows": "py3-none-win_amd64",
        "torch-universal": "py3-none-any",
    }
    assert {name: wheel_tag(name) for name in tags} == tags


def test_what_is_installed_is_asked_of_torch() -> None:
    import torch

    at = here()
    assert torch.__version__.startswith(f"{at.torch[0]}.{at.torch[1]}.")
    assert at.backend == ("cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu")
    assert misfit("torch-universal", at) is None
