"""Low-rank adapters as the package PEFT has them, apart from their base or merged into it."""

from typing import Any

import jax
import jax.numpy as jnp

from meap_jax.hf.weights import HubTensor, Read, hub_tensors
from meap_jax.model.config import Lora, ModelConfig

CONFIG_FILE, FILE = "adapter_config.json", "adapter_model.safetensors"


def config(lora: Lora, base: str | None) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of adapters; `base` is the name or the folder of what they are added to."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def tensors(model: ModelConfig) -> list[HubTensor]:
    """All tensors of a decoder's adapters, under the names and in the shapes that PEFT gives them."""
    found = []
    for weight in hub_tensors(model, num_rows=model.vocab_size):
        if weight.path[-1] not in model.lora.layers:
            continue
        (outputs, inputs), n, rank = weight.shape, weight.num_inputs, model.lora.rank
        name = f"base_model.model.{weight.name.removesuffix('.weight')}"
        for part, there, own in (
            ("A", (rank, inputs), (*weight.own_shape[:n], rank)),
            ("B", (outputs, rank), (rank, *weight.own_shape[n:])),
        ):
            path = (*weight.path[:-1], f"{weight.path[-1]}_lora_{part.lower()}")
            found.append(HubTensor(f"{name}.lora_{part}.weight", there, path, weight.layer, own))
    return found


def merged(read: Read, lora: Lora) -> Read:
    """Reads weights with their adapters in them, W + alpha / rank * A B in float32, and all else as `read` does."""

    def add(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.reshape(len(a), -1, lora.rank), b.reshape(len(b), lora.rank, -1)  # [layers, ...]
        w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
        return w + lora.alpha / lora.rank * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(w.shape)

    def read_merged(path: tuple[str, ...]) -> jax.Array:
        weight = read(path)
        if path[-1] not in lora.layers:
            return weight
        pair = (read((*path[:-1], f"{path[-1]}_lora_{part}")) for part in "ab")
        return jax.jit(add, out_shardings=weight.sharding)(weight, *pair)  # Training goes on with the weight.

    return read_merged
