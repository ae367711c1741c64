"""What training on many GPUs should take: `python -m benchmarks.scale`."""
