"""Names, clashes and switched-off plugins."""

from __future__ import annotations

import pytest

from pluglm import InputError, PluginConflictError, PluginDisabledError, PluginNotFoundError
from pluglm.provider import Problem, Provider
from pluglm.registry import Registry


def provider(name: str, *, kind: str = "attention", distribution: str = "acme") -> Provider:
    return Provider(kind, name, distribution, "1.0", "acme_module", "<test>")


def test_a_short_name_is_enough_while_it_is_unique() -> None:
    registry = Registry([provider("sdpa"), provider("flash")])
    assert registry.find("attention", "sdpa") == (provider("sdpa"), None)
    assert registry.find("attention", "flash:3") == (provider("flash"), "3")
    assert registry.find("attention", "acme:attention/flash:3") == (provider("flash"), "3")


def test_two_distributions_with_one_name_are_a_conflict_that_names_both_and_the_full_id_decides() -> None:
    registry = Registry([provider("flash"), provider("flash", distribution="zeta")])
    with pytest.raises(PluginConflictError) as caught:
        registry.find("attention", "flash")
    assert "acme:attention/flash, zeta:attention/flash" in str(caught.value)
    assert caught.value.candidates == ("acme:attention/flash", "zeta:attention/flash")
    assert registry.find("attention", "zeta:attention/flash")[0].distribution == "zeta"


def test_an_unknown_name_lists_what_is_there_and_guesses_the_nearest() -> None:
    with pytest.raises(PluginNotFoundError) as caught:
        Registry([provider("sdpa"), provider("eager")]).find("attention", "spda")
    assert str(caught.value).startswith("no plugin provides attention 'spda'.")
    assert "installed attention providers: eager, sdpa" in str(caught.value)
    assert "Did you mean 'sdpa'?" in str(caught.value)
    assert "'pluglm.attention'" in str(caught.value)
    assert (caught.value.kind, caught.value.name) == ("attention", "spda")


def test_what_discovery_stepped_over_is_told_when_a_name_is_not_found() -> None:
    problem = Problem("duplicate", "acme-fa3", "is installed twice, as 1.0 and 1.1.")
    with pytest.raises(PluginNotFoundError, match="acme-fa3: is installed twice"):
        Registry([], problems=[problem]).find("attention", "fa3")


def test_a_name_of_another_kind_is_refused() -> None:
    with pytest.raises(PluginNotFoundError, match="names a provider of kind 'cache' where one of kind 'attention'"):
        Registry([provider("sdpa")]).find("attention", "acme:cache/dynamic")


def test_a_switched_off_plugin_is_found_and_refused_with_the_way_back() -> None:
    registry = Registry([provider("sdpa")], refusal=lambda p: "disabled by the user")
    with pytest.raises(PluginDisabledError) as caught:
        registry.find("attention", "sdpa")
    assert "switched off" in str(caught.value)
    assert "pluglm plugins enable acme:attention/sdpa" in str(caught.value)


@pytest.mark.parametrize("text", ["", "a b", "../x", "http://x/y", "org/repo", "a:b:c:d"])
def test_what_is_no_name_is_refused_before_anything_is_looked_up(text: str) -> None:
    with pytest.raises(InputError):
        Registry([provider("sdpa")]).find("attention", text)


def test_the_order_of_installation_changes_nothing() -> None:
    a, b = provider("a"), provider("b", distribution="zeta")
    assert Registry([a, b]).providers == Registry([b, a]).providers
