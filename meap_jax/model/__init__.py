"""A Llama decoder in Flax NNX."""
