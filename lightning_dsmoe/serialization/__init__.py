"""A model as plain data: its architecture, checkpoints read safely, experts removed."""
