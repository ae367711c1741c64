"""What there is to measure on one GPU: `python -m benchmarks.gpu`, or `make gpu`."""
