"""What decoding strategies share: prompts, settings, processors, draws, feeds, endings. It imports nothing itself."""
