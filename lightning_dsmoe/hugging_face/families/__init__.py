"""One file for each family of models: what its configuration means, and where its tensors go."""
