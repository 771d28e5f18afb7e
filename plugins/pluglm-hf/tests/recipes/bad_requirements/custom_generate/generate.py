"""Requires what nobody has, and imports it."""

import foo_that_nobody_has


def generate(model, input_ids, **kwargs):
    return foo_that_nobody_has.run(model, input_ids)
