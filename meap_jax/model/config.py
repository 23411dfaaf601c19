"""The shape of a decoder, as a hashable value that a jitted function can close over."""

import dataclasses

import jax
import ml_collections

from meap_jax.fields import linear_layers, windowed_layers


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's angles are changed for texts longer than those of pre-training; as `model.rope_scaling` of fields."""

    kind: str
    factor: float
    original_seq_len: int
    low_freq_factor: float
    high_freq_factor: float
    beta_slow: float
    beta_fast: float
    attention_factor: float
    truncate: bool


@dataclasses.dataclass(frozen=True)
class Lora:
    """The low-rank adapters of linear layers; as `model.lora` of fields."""

    rank: int
    alpha: float
    targets: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers that have an adapter."""
        return linear_layers(self.targets) if self.rank else ()


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
    num_tokens: int
    rope_base: float
    rope_scaling: RopeScaling
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    window: int
    window_layers: str
    dtype: str
    init: str
    lora: Lora
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
        parts = {"rope_scaling": RopeScaling(**fields["rope_scaling"]), "lora": Lora(**fields["lora"])}
        return cls(**fields | parts)

    @property
    def has_window(self) -> tuple[bool, ...]:
        """Whether each layer's queries see `window` positions only."""
        return tuple(self.window > 0 and named for named in windowed_layers(self.window_layers, self.num_layers))

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a decoder layer."""
        D, F, d = self.embed_dim, self.mlp_dim, self.head_dim
        query, key = self.num_heads * d, self.num_kv_heads * d
        attention = {"q_proj": (D, query), "k_proj": (D, key), "v_proj": (D, key), "o_proj": (query, D)}
        return attention | {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}

    @property
    def num_parameters(self) -> int:
        """All of them: embedding, untied head, attention, SwiGLU, norms, adapters."""
        sizes = self.linear_sizes
        weights = sum(inputs * outputs for inputs, outputs in sizes.values())
        adapters = self.lora.rank * sum(sum(sizes[name]) for name in self.lora.layers)
        biases = self.qkv_bias * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = weights + biases + adapters + 2 * self.embed_dim
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        return self.num_layers * layer + tables + self.embed_dim


def resolve(attention: str, platform: str) -> str:
    """The backend of attention that "auto" means on a platform; others mean themselves."""
    if attention != "auto":
        return attention
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
