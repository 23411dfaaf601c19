"""The shape of a decoder, as a hashable value that a jitted function can close over."""

import dataclasses

import jax
import ml_collections


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama decoder; fields as in `meap_jax.fields`."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    vocab_size: int
    rope_base: float
    norm_eps: float
    dtype: str
    init: str
    attention: str
    unroll: int
    remat: str

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, platform: str | None = None) -> "ModelConfig":
        """From `config.model` of a run.

        Args:
          config: the fields.
          platform: JAX's word for the devices that will run it ("cpu", "tpu", "gpu"), on which the attention that
            "auto" means depends; default: that of this process.
        """
        fields = config.to_dict()
        fields["attention"] = resolve(fields["attention"], platform or jax.default_backend())
        return cls(**fields)

    @property
    def num_parameters(self) -> int:
        """All of them: embedding and untied head, attention, SwiGLU, norms."""
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        return self.num_layers * layer + 2 * self.vocab_size * self.embed_dim + self.embed_dim


def resolve(attention: str, platform: str) -> str:
    """The backend of attention that "auto" means on a platform; others mean themselves."""
    if attention != "auto":
        return attention
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
