"""Plans of a trained model: which experts to run in each layer.

What proposes, searches for or compares plans belongs here: `frontier` has the plans that a sweep
measures and the frontier of loss against active share, `search` looks for the plan that fits a
budget with the `solvers`, from `routing_statistics` and the `divergence` of predictions.
"""
