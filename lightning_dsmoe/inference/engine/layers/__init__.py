"""Packed routed layers that stand by themselves in any model, with the call of the trained ones.

`packed_layers` puts them in the place of the trained layers, `few_tokens` compiles what they do
with a few tokens. The methods for more tokens are those of a decoder's layers, in `batched`.
"""
