"""How good: the claims of the paper at a small scale, and what sparsity costs."""
