"""The command line, `pluglm`. Commands that manage plugins import none of them, and no torch."""
