"""What runs a plan fast: everything between a packed decoder and its logits.

`engine` chooses the method for a number of tokens, by `switch_points` that `tuning` measures;
`cache` holds keys and values for all methods. Three rooms follow: `weights` stores expert weights
as kernels read them, `decode` has the compiled step of single new tokens, `batched` has prompts and
large batches. What is slower but plain stays in the layers' own `forward`.
"""
