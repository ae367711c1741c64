"""Measurements of speed and quality; run each from the root of the repository with `python -m`."""
