"""What runs a plan fast: packed weights, compiled decoding, masked and grouped layers."""
