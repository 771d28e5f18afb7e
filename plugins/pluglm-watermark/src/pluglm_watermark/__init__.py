"""Watermarks for generated text, and their detectors. It imports nothing itself: see `green` and `synthid`."""
