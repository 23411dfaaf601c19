"""Which preset the notebook takes for which accelerator, and that each preset is a run."""

import jax
import pytest

from configs import quickstart
from experiments.presets import MEDIUM, QUICKSTART, SMALL, preset_for
from meap_jax import config as config_lib
from meap_jax import sharding
from meap_jax.model.config import ModelConfig


@pytest.mark.parametrize(
    ("platform", "kind", "name", "preset", "dtype"),
    [
        ("cpu", "cpu", "CPU", QUICKSTART, "float32"),
        ("tpu", "TPU v5 lite", "TPU v5e", SMALL, "bfloat16"),
        ("tpu", "TPU v6 lite", "TPU v6e", MEDIUM, "bfloat16"),
        ("tpu", "TPU v5", "TPU v5p", MEDIUM, "bfloat16"),
        ("tpu", "TPU v2", "TPU v2", SMALL, "bfloat16"),
        ("tpu", "TPU7x", "TPU v7", MEDIUM, "bfloat16"),
        ("gpu", "Tesla T4", "GPU T4", SMALL, "float32"),
        ("gpu", "NVIDIA L4", "GPU L4", SMALL, "bfloat16"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "GPU A100", MEDIUM, "bfloat16"),
        ("cuda", "NVIDIA H100 80GB HBM3", "GPU H100", MEDIUM, "bfloat16"),
        ("gpu", "NVIDIA L40S", "NVIDIA L40S", SMALL, "float32"),  # No L4.
        ("gpu", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", SMALL, "float32"),
        ("tpu", "TPU v9", "TPU v9", SMALL, "float32"),
    ],
)
def test_every_accelerator_gets_the_preset_that_fits(platform, kind, name, preset, dtype):
    found, chosen = preset_for(platform, kind)
    assert (found, chosen.name) == (name, preset.name)
    assert preset.settings.items() <= chosen.settings.items()
    assert chosen.settings.get("model.dtype", "float32") == dtype


@pytest.mark.parametrize(("preset", "millions"), [(QUICKSTART, 0.17), (SMALL, 3.5), (MEDIUM, 26)])
def test_every_preset_is_a_run_on_one_device_and_on_eight(preset, millions):
    c = quickstart.get_config()
    c.update_from_flattened_dict(preset.settings)
    config_lib.check(c)
    assert ModelConfig.of(c.model).num_parameters / 1e6 == pytest.approx(millions, rel=0.1)
    for num in (1, 8):
        mesh = sharding.make_mesh(c.mesh, jax.devices()[:num])
        sharding.check_batch(mesh, c.global_batch_size, c.grad_accum_steps, c.seq_len)
    assert c.num_steps % c.eval.every == 0 and c.num_steps % c.checkpoint.every == 0
