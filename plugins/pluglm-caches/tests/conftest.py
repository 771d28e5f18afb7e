"""Which of these tests are slow: `make wheels` leaves them out, since `make test` runs them."""

from __future__ import annotations

import pytest

_SLOW = (
    "test_random_operations_equal_a_plain_list_model",
    "test_4096_tokens_",
    "test_processes_that_write_read_and_evict",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, those of the kit too."""
    for item in items:
        if item.name.startswith(_SLOW):
            item.add_marker(pytest.mark.slow)
