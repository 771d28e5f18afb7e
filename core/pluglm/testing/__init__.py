"""Conformance kits for plugin authors: subclass the contract of your kind and pytest does the rest."""
