"""Sizes of the notebook's runs by accelerator."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Sizes that an accelerator trains in some minutes a run."""

    name: str
    settings: dict[str, Any]  # Fields of configs/quickstart.py that change.


# Batches split over up to 8 devices. Larger models get more documents, and a lower learning rate. Sizes come from
# arithmetic (6 FLOPs a parameter and token, at a fifth to a third of the chip's peak), not from tuning.
QUICKSTART = Preset("quickstart", {})  # 0.2M parameters, 2.9M tokens.
SMALL = Preset(  # 3M parameters, 61M tokens: 1.3 PFLOPs a run.
    "small",
    {
        "num_steps": 4_000,
        "global_batch_size": 64,
        "model.num_layers": 4,
        "model.num_heads": 4,
        "model.num_kv_heads": 4,
        "model.head_dim": 64,
        "model.embed_dim": 256,
        "model.mlp_dim": 704,
        "optimizer.learning_rate": 1e-3,
        "data.retrieval.num_documents": 100_000,
        "eval.every": 400,
        "checkpoint.every": 1_000,
    },
)
MEDIUM = Preset(  # 26M parameters, 246M tokens: 38 PFLOPs a run.
    "medium",
    {
        "num_steps": 8_000,
        "global_batch_size": 128,
        "model.num_layers": 8,
        "model.num_heads": 8,
        "model.num_kv_heads": 8,
        "model.head_dim": 64,
        "model.embed_dim": 512,
        "model.mlp_dim": 1408,
        "optimizer.learning_rate": 6e-4,
        "data.retrieval.num_documents": 200_000,
        "eval.every": 800,
        "checkpoint.every": 2_000,
    },
)

# What `device_kind` holds -> name, preset, whether bfloat16 is native; the first that fits.
# TPU kinds are jax's own (jax/_src/pallas/mosaic/tpu_info.py), GPU kinds the driver's.
ACCELERATORS: tuple[tuple[str, str, Preset, bool], ...] = (
    ("TPU v2", "TPU v2", SMALL, True),
    ("TPU v3", "TPU v3", SMALL, True),
    ("TPU v4", "TPU v4", MEDIUM, True),
    ("TPU v5 lite", "TPU v5e", SMALL, True),
    ("TPU v5e", "TPU v5e", SMALL, True),
    ("TPU v5", "TPU v5p", MEDIUM, True),
    ("TPU v6", "TPU v6e", MEDIUM, True),
    ("TPU7", "TPU v7", MEDIUM, True),
    ("T4", "GPU T4", SMALL, False),
    ("V100", "GPU V100", SMALL, False),
    ("P100", "GPU P100", SMALL, False),
    ("L4", "GPU L4", SMALL, True),
    ("A100", "GPU A100", MEDIUM, True),
    ("H100", "GPU H100", MEDIUM, True),
    ("H200", "GPU H200", MEDIUM, True),
    ("B200", "GPU B200", MEDIUM, True),
)


def preset_for(platform: str, device_kind: str) -> tuple[str, Preset]:
    """The name of an accelerator, and the preset that fits it.

    Args:
      platform: `jax.devices()[0].platform`: cpu, tpu, gpu (or cuda, rocm).
      device_kind: `jax.devices()[0].device_kind`, such as "TPU v5 lite" or "NVIDIA A100-SXM4-40GB".

    Returns:
      One that the table does not know gets the small preset in float32, under the name that it has.
    """
    if platform == "cpu":
        return "CPU", QUICKSTART
    words = device_kind if platform == "tpu" else f" {device_kind} ".replace("-", " ")
    for part, name, preset, has_bfloat16 in ACCELERATORS:
        if (part if platform == "tpu" else f" {part} ") in words:
            dtype = {"model.dtype": "bfloat16"} if has_bfloat16 else {}
            return name, preset._replace(settings=preset.settings | dtype)
    return device_kind, SMALL
