"""Host side of the data: sources, tokenizers, packing and the prepared folder."""
