"""What no device can hold is refused before it is made."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meap_jax import memory
from meap_jax.errors import ConfigError
from meap_jax.run import open_run
from meap_jax.sharding import make_mesh
from tiny_runs import tiny_config

MESH_OF_8 = dict(data=1, fsdp=8, tensor=1, context=1)


def array(num_bytes, split):
    mesh = make_mesh(MESH_OF_8)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp" if split else None))
    return [jax.ShapeDtypeStruct((num_bytes // 4,), "float32", sharding=sharding)], mesh.devices.flat


def test_what_fits_passes_and_devices_of_a_cpu_share_one_memory():
    room = memory.host_memory()
    memory.check_fits(*array(room // 2, split=True), "it", "make it smaller")
    memory.check_fits(*array(room // 16, split=False), "it", "make it smaller")
    for size, split in ((2 * room, True), (room // 4, False)):  # Eight copies of a quarter.
        with pytest.raises(ConfigError, match=r"^it takes [\d.]+ GB, but this machine has [\d.]+ GB: make it sm"):
            memory.check_fits(*array(size, split), "it", "make it smaller")


class Chip:
    """A device of an accelerator as JAX shows it."""

    platform, device_kind, process_index = "tpu", "TPU v5e", 0

    def __init__(self, stats):
        self.memory_stats = stats


def test_an_accelerator_is_asked_for_its_memory_and_one_that_is_not_here_is_passed_over():
    def absent():
        raise NotImplementedError

    shapes = [jax.ShapeDtypeStruct((2**32,), "float32")]
    with pytest.raises(ConfigError, match="it takes 17.2 GB on a device, but TPU v5e has 16.0 GB: split it."):
        memory.check_fits(shapes, [Chip(lambda: {"bytes_limit": 16 * 10**9})], "it", "split it")
    for stats in (absent, lambda: None, lambda: {"bytes_limit": 18 * 10**9}):
        memory.check_fits(shapes, [Chip(stats)], "it", "split it")


@pytest.mark.parametrize("field", ["model.embed_dim", "model.mlp_dim", "model.vocab_size", "model.head_dim"])
@pytest.mark.parametrize("value", [10**8, 2**31 - 2])
def test_a_model_of_a_size_that_no_machine_has_is_refused_with_its_number_of_parameters(field, value, tmp_path):
    config = tiny_config(**{field: value})
    with pytest.raises(ConfigError, match=r"^a model of [\d,]+ parameters, trained on 8 rows of 16 tokens a step, ta"):
        open_run(config, tmp_path)
    assert not list(tmp_path.iterdir())
