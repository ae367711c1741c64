"""Forward passes of many tokens, uncompiled: prompts, evaluation, decoding of large batches.

`forward` walks through a decoder. `mixtures` chooses for each layer, also of other models, between
`masked_layers`, all experts on all tokens under gates of zero, and `grouped_layers`, each expert on
its own tokens. A new way
to run many tokens through a layer belongs here; steps of single new tokens belong in `decode`.
"""
