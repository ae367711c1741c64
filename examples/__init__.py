"""Programs to read and to run: `python examples/vision.py`."""
