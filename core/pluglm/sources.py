"""Where a model's files are: a folder, an installed source, or the Hub."""

from __future__ import annotations

from pathlib import Path

from pluglm.contracts.text import SourceRequest
from pluglm.errors import InputError, ModelNotFoundError
from pluglm.manager import Manager, check_contract
from pluglm.registry import Registry
from pluglm.request import LoadRequest


def find_model(request: LoadRequest, manager: Manager) -> Path:
    """The folder of the model a user named: a path, an installed source's, or the Hub's.

    Raises: ModelNotFoundError; InputError for a revision of a folder, which has none.
    """
    from pluglm.checkpoint import resolve

    if Path(request.model).expanduser().is_dir():
        if request.revision is not None:
            raise InputError(
                f"{request.model!r} is a folder, so revision={request.revision!r} means nothing.",
                why="only repositories on the Hub have revisions; the folder would be loaded as it is.",
                fix="Leave revision out, or name the repository as org/name.", argument="revision",
            )  # fmt: skip
        return resolve(request.model)
    wish = SourceRequest(request.model, request.revision, request.offline, request.token)
    for provider in manager.registry.of("source"):
        if provider.name == request.model:
            found, _ = manager.registry.find("source", request.model)  # refuses a name that two distributions claim
            source = check_contract(manager, found, manager.call(found, "pluglm_build_source", request=wish))
            folder = source.resolve(wish)
            if folder is None:
                raise ModelNotFoundError(
                    f"{provider.id} {provider.version} does not have its own model {request.model!r}.",
                    fix=f"Install {provider.distribution} again.",
                    model=request.model,
                )
            return Path(folder)
    return resolve(request.model, revision=request.revision, offline=request.offline, token=request.token)


def default_model(registry: Registry) -> str:
    """The model to use when the user names none: that of the one installed source that offers a default.

    Raises: InputError if there is none, or more than one.
    """
    names = [p.name for p in registry.of("source") if "default-model" in (p.facts or {}).get("features", ())]
    names = [n for n in names if registry.refusal(registry.find("source", n)[0]) is None]
    if len(names) != 1:
        raise InputError(
            "no model was named."
            if not names
            else f"no model was named, and {len(names)} sources offer a default: {names}.",
            fix="Pass -m with a folder or org/name"
            + (", or install pluglm-model-pystdlib, which brings a small one." if not names else "."),
            argument="model",
        )
    return names[0]
