"""Prompts and large batches: all experts under gates of zero, or each on its own tokens."""
