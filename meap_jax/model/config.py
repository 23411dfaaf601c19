"""The shape of a decoder, as a hashable value that a jitted function can close over."""

import dataclasses

import ml_collections


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama decoder; fields as in `meap_jax.config.base`."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    vocab_size: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    dtype: str = "float32"
    init: str = "official"
    unroll: int = 1
    remat: bool = False

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "ModelConfig":
        """From `config.model` of a run."""
        return cls(**config.to_dict())

    @property
    def num_parameters(self) -> int:
        """All of them: embedding and untied head, attention, SwiGLU, norms."""
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        return self.num_layers * layer + 2 * self.vocab_size * self.embed_dim + self.embed_dim
