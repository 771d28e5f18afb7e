"""The conformance kit fails caches that are wrong in one place each."""

import pluglm_caches
import pytest
from hypothesis import Phase
from pluglm_caches import tokens
from pluglm_caches.cache import SlotCache
from pluglm_caches.cells import Cells
from pluglm_caches.layout import Layout

from pluglm.testing.cache import CacheContract, provider_facts


class Kit(CacheContract):
    __test__ = False
    provider = pluglm_caches.dynamic
    facts = provider_facts("pluglm_caches", "cache", "dynamic")
    max_examples = 80  # it ends at the first failure; without the break these laws pass, in test_contract.py
    phases = (Phase.generate,)


def crop_one_too_few(monkeypatch):
    right = SlotCache.crop
    monkeypatch.setattr(SlotCache, "crop", lambda self, length: right(self, min(length + 1, self.length)))


def reorder_that_forgets_the_values(monkeypatch):
    def take_rows(self, index, held):
        two = self.two
        right(self, index, held)
        if two.shape[0] == index.shape[0]:
            self.two = before.pop()

    right, before = tokens.TokenStore.take_rows, []

    def wrapped(self, index, held):
        before.append(self.two.clone())
        take_rows(self, index, held)

    monkeypatch.setattr(tokens.TokenStore, "take_rows", wrapped)


def fork_that_shares_storage(monkeypatch):
    monkeypatch.setattr(tokens.TokenStore, "copy", lambda self: self.like(self.one, self.two))


def commit_in_append(monkeypatch):
    right = SlotCache.append

    def append(self, slot, k, v, step):
        view = right(self, slot, k, v, step)
        self.length = step.start + step.count
        return view

    monkeypatch.setattr(SlotCache, "append", append)


def rollback_that_makes_no_holes(monkeypatch):
    monkeypatch.setattr(Cells, "punch", lambda self, counts, highest: None)


def padding_that_counts_as_a_position(monkeypatch):
    right = Cells.write
    monkeypatch.setattr(
        Cells, "write", lambda self, p, count, *, dense: right(self, p.clamp(min=0), count, dense=dense)
    )


def load_that_keeps_the_old_cells(monkeypatch):
    monkeypatch.setattr(tokens.TokenStore, "restore", lambda self, tensors, held: self.grow(held, 0))


def nbytes_of_held_cells_only(monkeypatch):
    def nbytes(self):
        return sum(
            t.narrow(store.axis, 0, self.length).nbytes
            for store in self._stores
            if isinstance(store, tokens.TokenStore)
            for t in store.tensors()
        )

    monkeypatch.setattr(SlotCache, "nbytes", property(nbytes))


def states_updated_before_the_commit(monkeypatch):
    monkeypatch.setattr("pluglm_caches.states.StateStore.opened", lambda self: self.states)


def options_that_are_ignored(monkeypatch):
    right = Layout.refusals
    monkeypatch.setattr(Layout, "refusals", lambda self: [r for r in right(self) if "option" not in r])


BREAKS = {
    crop_one_too_few: "test_random_operations_equal_a_plain_list_model",
    reorder_that_forgets_the_values: "test_random_operations_equal_a_plain_list_model",
    fork_that_shares_storage: "test_random_operations_equal_a_plain_list_model",
    commit_in_append: "test_each_slot_kind_gives_back_what_was_appended",
    rollback_that_makes_no_holes: "test_random_operations_equal_a_plain_list_model",
    padding_that_counts_as_a_position: "test_random_operations_equal_a_plain_list_model",
    load_that_keeps_the_old_cells: "test_random_operations_equal_a_plain_list_model",
    nbytes_of_held_cells_only: "test_nbytes_is_what_the_tensors_hold",
    states_updated_before_the_commit: "test_a_failed_pass_changes_nothing",
    options_that_are_ignored: "test_what_it_does_not_know_is_refused_by_name",
}


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_the_kit_fails_a_cache_with(break_it, monkeypatch):
    law = getattr(Kit(), BREAKS[break_it])
    break_it(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law()
