"""Fetches one commit's recipe or kernel into the quarantine: names and sizes first, then the files that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pluglm.errors import ModelNotFoundError, PluglmError
from pluglm.vendored import MAX_FILE_BYTES, check_names
from pluglm_vendor import kernel
from pluglm_vendor.bundle import MAX_PAPER_BYTES, PAPER, check_papers
from pluglm_vendor.hub import commit_now, download, endpoint, explained, kernel_listing, offline
from pluglm_vendor.hub import listing as _listing
from pluglm_vendor.kernel import Kernel, fetched_kernel, variants_of
from pluglm_vendor.quarantine import Quarantine
from pluglm_vendor.recipe import Recipe, fetched_recipe
from pluglm_vendor.sources import HubSource, not_pinned
from pluglm_vendor.variants import Here, choose

_T = TypeVar("_T")


def fetch(source: HubSource, token: str | None = None, quarantine: Quarantine | None = None) -> Recipe:
    """The recipe of a commit, from the quarantine if it was fetched before.

    Args:
        source: what the user wrote. token: None: the one that the Hub's client has stored.
        quarantine: None: the user's.
    Raises: InputError for anything but a whole commit hash (with the hash, if the Hub can be asked), and for a recipe
        that breaks a rule; ModelError and ModelNotFoundError if the Hub refuses or cannot be reached; SaveError.
    """
    _check_pinned(source, token)
    quarantine = quarantine or Quarantine(source)
    known = quarantine.load()
    recipe = None if known is None else fetched_recipe(source, *known)
    if recipe is not None:
        return recipe
    _check_online(source, quarantine)

    def take() -> tuple[dict[str, bytes], tuple[str, ...]]:
        sizes = _listing(source, token)
        names = check_names(source.repo, sizes)
        papers = [name for name in sizes if PAPER.fullmatch(name)]
        check_papers(source.repo, {name: sizes[name] for name in papers})
        content = {name: download(source, name, token, MAX_FILE_BYTES) for name in names}
        check_names(source.repo, {name: len(content[name]) for name in names})
        content.update({name: download(source, name, token, MAX_PAPER_BYTES) for name in papers})
        others = sorted(n for n in sizes if n.startswith("custom_generate/") and n not in names)
        left_out = tuple(n.removeprefix("custom_generate/") for n in others if "/__pycache__/" not in n)
        return content, left_out

    content, left_out = _asking(source, take)
    quarantine.store(content, left_out)
    taken = fetched_recipe(source, content, left_out)
    assert taken is not None  # check_names wants its entry
    return taken


def fetch_kernel(
    source: HubSource, wish: str | None, at: Here, token: str | None = None, quarantine: Quarantine | None = None
) -> Kernel:
    """One build of the kernel of a commit, from the quarantine if it was fetched before.

    Args:
        wish: name of the build; None: the one that fits. at: what is installed. The others as in `fetch`.
    Raises: as `fetch`; InputError with every build and why if none fits.
    """
    _check_pinned(source, token, kernel=True)
    quarantine = quarantine or Quarantine(source, form="kernel")
    listed = quarantine.load_listing()
    if listed is None:
        _check_online(source, quarantine)
        listed = _asking(source, lambda: kernel_listing(source, token))
        quarantine.store_listing(*listed)
    repo_type, sizes = listed
    variants = tuple(variants_of(source.repo, sizes))
    variant = choose(source.repo, variants, wish, at)
    known = quarantine.load(variant)
    taken = None if known is None else fetched_kernel(source, variants, variant, known[0])
    if taken is not None:
        return taken
    names = kernel.check_names(source.repo, variant, sizes)
    papers = [name for name in sizes if PAPER.fullmatch(name)]
    check_papers(source.repo, {name: sizes[name] for name in papers}, "kernel")
    _check_online(source, quarantine)

    def take() -> dict[str, bytes]:
        content = {name: download(source, name, token, kernel.limit(name), repo_type) for name in names}
        kernel.check_names(source.repo, variant, {name: len(data) for name, data in content.items()})
        return content | {name: download(source, name, token, MAX_PAPER_BYTES, repo_type) for name in papers}

    content = _asking(source, take)
    quarantine.store(content, (), variant)
    taken = fetched_kernel(source, variants, variant, content)
    assert taken is not None  # check_names wants a package
    return taken


def _check_pinned(source: HubSource, token: str | None, *, kernel: bool = False) -> None:
    if not source.pinned:
        raise not_pinned(source, commit_now(source, token, kernel=kernel), endpoint())


def _check_online(source: HubSource, quarantine: Quarantine) -> None:
    if offline():
        raise ModelNotFoundError(
            f"{source} was not fetched before.",
            why="HF_HUB_OFFLINE is set, so the Hub is not asked, and the quarantine does not have this commit.",
            fix="Run the same command once with a connection, or vendor a folder.",
            model=source.repo, path=str(quarantine.folder),
        )  # fmt: skip


def _asking(source: HubSource, ask: Callable[[], _T]) -> _T:
    """What `ask` gives; failures of the Hub become ours."""
    try:
        return ask()
    except PluglmError:
        raise
    except Exception as error:
        raise explained(source, error) from error
