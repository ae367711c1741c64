"""`python -m lightning_dsmoe`."""

from lightning_dsmoe.cli import main

main()
