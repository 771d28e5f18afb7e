"""Activation, policy and quarantine: what is wrong with one plugin ends at that plugin."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest

from pluglm import PluginDisabledError, QuarantinedError, UnsupportedRequestError, hookimpl
from pluglm.manager import Manager, check_contract
from pluglm.provider import Provider
from pluglm.testing.isolation import fake_provider, isolated_manager


class Layout:
    name, operations, view, streams = "good", frozenset[str](), "dense", False

    def new(self, *, batch_size: int, capacity: int | None = None) -> None: ...


class Good:
    @hookimpl
    def pluglm_build_cache(self, request: Any) -> Any:
        return Layout()


class Raises:
    @hookimpl
    def pluglm_build_cache(self, request: Any) -> Any:
        raise ZeroDivisionError("no blocks")


class Exits:
    @hookimpl
    def pluglm_build_cache(self, request: Any) -> Any:
        raise SystemExit(3)


class Refuses:
    @hookimpl
    def pluglm_build_cache(self, request: Any) -> Any:
        raise UnsupportedRequestError("it cannot.", reasons=("too wide",))


class ReturnsNone:
    @hookimpl
    def pluglm_build_cache(self, request: Any) -> Any:
        return None


class ReturnsWrongThing:
    @hookimpl
    def pluglm_build_cache(self, request: Any) -> Any:
        return {"name": "dict"}


class WrongSignature:
    @hookimpl
    def pluglm_build_cache(self, question: Any) -> Any: ...


class Misspelt:
    @hookimpl
    def pluglm_build_cahce(self, request: Any) -> Any: ...


class Unmarked:
    def pluglm_build_cache(self, request: Any) -> Any: ...


class Empty:
    pass


def call(manager: Manager, provider: Provider) -> Any:
    return check_contract(manager, provider, manager.call(provider, "pluglm_build_cache", request=object()))


class Snooping(Good):
    @hookimpl
    def pluglm_rank(self, kind: str, candidates: Any) -> Any:
        return [candidates[-1].id]


BROKEN: list[tuple[type, str, str]] = [
    (Raises, "build", "ZeroDivisionError: no blocks"),
    (Exits, "build", "SystemExit: 3"),
    (ReturnsNone, "contract", "pluglm_build_cache returned None"),
    (ReturnsWrongThing, "contract", "returned dict, which has no name, operations, view, new"),
    (WrongSignature, "register", "question"),
    (Misspelt, "register", "pluglm_build_cahce"),
    (Unmarked, "register", "lacks the @hookimpl mark"),
    (Snooping, "register", "implements pluglm_rank without an entry point in 'pluglm.hooks'"),
    (Empty, "register", "does not implement pluglm_build_cache"),
]


@pytest.mark.parametrize(("plugin", "stage", "cause"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_plugin_is_set_aside_with_its_stage_and_cause_and_the_others_work(
    plugin: type, stage: str, cause: str
) -> None:
    broken = fake_provider("cache", "broken", plugin(), distribution="acme-broken", version="2.1")
    good = fake_provider("cache", "good", Good())
    manager = isolated_manager(broken, good)
    with pytest.raises(QuarantinedError) as caught:
        call(manager, broken)
    message = str(caught.value)
    assert "acme-broken 2.1" in message
    assert cause in message
    assert "Everything else works" in message
    assert caught.value.stage == stage
    assert caught.value.plugin == "acme-broken:cache/broken"
    assert caught.value.__cause__ is not None
    assert call(manager, good).name == "good"


def test_asking_again_for_a_quarantined_plugin_raises_with_the_original_cause() -> None:
    broken = fake_provider("cache", "broken", Raises())
    manager = isolated_manager(broken)
    for _ in range(2):
        with pytest.raises(QuarantinedError, match="ZeroDivisionError: no blocks"):
            call(manager, broken)


def test_an_import_that_fails_is_quarantined_and_names_the_missing_module() -> None:
    missing = Provider("cache", "lost", "acme-lost", "1.0", "acme_module_that_is_not_there", "<test>")
    with pytest.raises(QuarantinedError, match="cannot be imported") as caught:
        call(isolated_manager(missing), missing)
    assert "acme_module_that_is_not_there" in str(caught.value)


def test_a_refusal_is_the_plugins_answer_and_no_failure() -> None:
    refusing = fake_provider("cache", "narrow", Refuses())
    manager = isolated_manager(refusing)
    with pytest.raises(UnsupportedRequestError, match="it cannot"):
        call(manager, refusing)
    assert manager.quarantine == {}


def test_two_providers_may_share_one_module() -> None:
    plugin = Good()
    first = fake_provider("cache", "first", plugin)
    second = Provider("cache", "second", "acme-test", "1.0", first.target, "<test>")
    manager = isolated_manager(first, second)
    assert call(manager, first).name == call(manager, second).name == "good"


def test_each_provider_is_called_alone_even_when_others_implement_the_same_hook() -> None:
    calls: list[str] = []

    def recording(name: str) -> Any:
        class Recording:
            @hookimpl
            def pluglm_build_cache(self, request: Any) -> Any:
                calls.append(name)
                return Layout()

        return Recording()

    providers = [fake_provider("cache", name, recording(name)) for name in ("a", "b", "c")]
    manager = isolated_manager(*providers)
    for provider in providers:
        call(manager, provider)
    call(manager, providers[1])
    assert calls == ["a", "b", "c", "b"]


class Denying:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def pluglm_check_policy(self, provider: Provider) -> str | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if provider.kind == "cache" else None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("not on the list", "denied by policy: not on the list"), (OSError("no policy file"), "OSError: no policy file")],
)
def test_a_plugin_that_policy_denies_is_never_imported_and_a_failing_policy_denies(answer: Any, reason: str) -> None:
    target = Provider("cache", "x", "acme-x", "1.0", "acme_never_imported_module", "<test>")
    observer = fake_provider("hooks", "police", Denying(answer))
    manager = isolated_manager(target, observer)
    with pytest.raises(PluginDisabledError) as caught:
        call(manager, target)
    assert reason in str(caught.value)
    assert "acme_never_imported_module" not in sys.modules
    assert manager.quarantine == {}


def test_one_denial_wins_over_any_number_of_abstentions() -> None:
    target = fake_provider("cache", "x", Good())
    observers = [fake_provider("hooks", f"o{i}", Denying("no" if i == 1 else None)) for i in range(3)]
    assert isolated_manager(target, *observers).refusal(target) == "denied by policy: no"


def test_audit_events_tell_the_life_of_a_plugin_and_a_failing_observer_harms_nothing() -> None:
    events: list[str] = []

    class Auditor:
        @hookimpl
        def pluglm_audit(self, event: str, data: Mapping[str, Any]) -> None:
            events.append(f"{event} {data['provider']}")

    class Clumsy:
        @hookimpl
        def pluglm_audit(self, event: str) -> None:
            raise RuntimeError("disk full")

    good, broken = fake_provider("cache", "good", Good()), fake_provider("cache", "broken", Raises())
    manager = isolated_manager(
        good, broken, fake_provider("hooks", "a", Auditor()), fake_provider("hooks", "b", Clumsy())
    )
    call(manager, good)
    with pytest.raises(QuarantinedError):
        call(manager, broken)
    assert [e for e in events if "cache/" in e] == [
        "imported acme-test:cache/good", "built acme-test:cache/good",
        "imported acme-test:cache/broken", "quarantined acme-test:cache/broken",
    ]  # fmt: skip
    assert any("disk full" in str(q.cause) for q in manager.quarantine.values())


def test_an_observer_that_fails_to_configure_is_set_aside() -> None:
    class Failing:
        @hookimpl
        def pluglm_configure(self, version: str) -> None:
            raise RuntimeError(f"needs another pluglm than {version}")

    manager = isolated_manager(fake_provider("hooks", "old", Failing()))
    (entry,) = manager.quarantine.values()
    assert "needs another pluglm than 0." in str(entry)
