"""Data: tokenizers, text sources, packing, and the batches made of them."""
