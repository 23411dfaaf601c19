"""The real training step, compiled for TPUs and GPUs that this machine lacks.

`make test-aot` installs the compilers; without them these tests are skipped.
"""

import json
import os
import subprocess
import sys

import pytest

from configs import long_context_64k
from meap_jax import config as config_lib
from meap_jax.aot.report import compile_for, generation_report
from meap_jax.aot.targets import find_target
from meap_jax.errors import ConfigError
from meap_jax.sharding import make_mesh

KINDS = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}


def compiler_of(topology):
    @pytest.fixture
    def compiler():
        try:
            find_target(topology)
        except ConfigError as error:
            pytest.skip(str(error))

    return compiler


tpu_compiler, gpu_compiler = compiler_of("v5e:2x2"), compiler_of("h100:8")


def command(*arguments):
    """Runs the command without the environment of these tests; returns the report in its last line."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    typed = [sys.executable, "-m", "meap_jax.aot", *arguments]
    result = subprocess.run(typed, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(report, *, devices, parameters):
    """What is true of the step of any paper config whose parameters are sharded over all devices."""
    assert (report["devices"], report["parameters"]) == (devices, parameters)
    assert report["mesh"] == {"data": 1, "fsdp": devices, "tensor": 1, "context": 1}

    # Parameters and two moments in float32, of which norms alone are on every device. A TPU pads the two last axes of
    # an array to tiles of 8 x 128, which those of the q, k and v projections, heads x 64, don't fill.
    memory = report["hbm_bytes"]
    assert 1 <= memory["arguments"] / (12 * parameters / devices) < 1.3
    # The new state takes the place of the old one; what is left are metrics and the counters.
    assert memory["outputs"] - memory["aliased"] < 10_000
    assert report["fits"] == (memory["total"] <= report["hbm_capacity"])

    # Nothing is left out of the count, which has at least the model's FLOPs and at most what remat adds to them, with
    # attention counted in full and computed three times instead of one.
    assert report["uncounted"] == {"kernels": {}, "loops": []}
    assert 1 < report["compiled_over_model_flops"] < 2.2

    # Parameters are gathered in bfloat16 for each micro-batch, forward and backward, and gradients reduced.
    assert set(report["collectives"]) <= KINDS
    sent = sum(traffic["bytes"] for traffic in report["collectives"].values())
    micro_batches = 4
    assert 2 * 2 * parameters * micro_batches * 0.8 < sent < 2 * 8 * parameters * micro_batches

    assert 0 < report["mfu_bound"] < 1


@pytest.mark.parametrize(
    "size, topology, devices, parameters, compiler",
    [
        ("100m", "v5e:4x4", 16, 122_407_680, "libtpu"),
        ("1b", "v5e:8x8", 64, 1_175_816_192, "libtpu"),
        ("1b", "h100:8", 8, 1_175_816_192, "jax-cuda13-plugin"),
    ],
)
def test_a_paper_config_compiles_for_its_devices(request, size, topology, devices, parameters, compiler):
    request.getfixturevalue("gpu_compiler" if "cuda" in compiler else "tpu_compiler")
    report = command(f"--config=configs/meap_{size}.py", f"--topology={topology}")
    check(report, devices=devices, parameters=parameters)
    assert report["versions"][compiler]


@pytest.mark.parametrize(
    "model, topology, parameters",
    [
        ("llama32_3b", "v5e:4x4", 3_212_749_824),
        ("llama3_8b", "v6e:4x4", 8_030_785_536),
        ("mistral_7b_v02", "v5e:4x4", 7_242_256_384),
        ("qwen25_14b", "v6e:4x4", 14_770_033_664),
    ],
)
def test_fine_tuning_of_the_papers_models_fits_a_slice(tpu_compiler, model, topology, parameters):
    report = command(f"--config=configs/sft_{model}_meap.py", f"--topology={topology}")
    assert report["parameters"] == parameters
    assert report["fits"] and report["uncounted"] == {"kernels": {}, "loops": []}
    assert any("segmented" in kernel for kernel in report["attention_kernels"]), "samples are kept apart"
    # Parameters and two moments in float32.
    assert 1 <= report["hbm_bytes"]["arguments"] / (12 * parameters / 16) < 1.1


def small(num_layers, **model):
    """A paper config made small, whose programs compile in seconds."""
    config = config_lib.paper("100m", "meap")
    config.model.update(dict(num_layers=num_layers, num_heads=4, embed_dim=256, mlp_dim=512, vocab_size=32_064) | model)
    config.seq_len, config.global_batch_size, config.grad_accum_steps = 256, 16, 2
    return config


def count(topology, config):
    return compile_for(config, topology)["compiled_flops"]


@pytest.mark.parametrize("num_layers", [2, 4])
def test_a_tpu_program_counts_the_same_scanned_and_unrolled(tpu_compiler, num_layers):
    scanned, unrolled = (count("v5e:2x2", small(num_layers, unroll=unroll)) for unroll in (1, num_layers))
    assert scanned == pytest.approx(unrolled, rel=0.01)


def test_a_gpu_program_counts_the_same_scanned_and_unrolled_and_as_a_tpu_program_does(tpu_compiler, gpu_compiler):
    counts = [count("h100:4", small(4)), count("h100:4", small(4, unroll=4)), count("v5e:2x2", small(4))]
    assert counts[1:] == pytest.approx([counts[0]] * 2, rel=0.01)


@pytest.mark.parametrize("gpu", ["a100", "b200"])
def test_other_gpus_have_a_compiler_too(gpu_compiler, gpu):
    report = compile_for(small(2), f"{gpu}:4")
    assert (report["devices"], report["chip"], report["uncounted"]) == (4, gpu, {"kernels": {}, "loops": []})


def test_one_chip_and_chips_of_two_cores_are_one_device_each(tpu_compiler):
    assert len(find_target("v5e:1x1").devices) == 1
    assert len(find_target("v4:2x2x1").devices) == 4


def test_a_program_that_does_not_fit_is_an_answer_not_a_failure(tpu_compiler):
    config = small(2, embed_dim=8192, mlp_dim=32_768)  # 2 x 0.9e9 parameters, 12 bytes each, on 16 GiB.
    report = compile_for(config, "v5e:1x1")
    assert report["fits"] is False
    assert report["hbm_bytes"]["total"] > report["hbm_capacity"]
    assert report["step_seconds"] is None


def test_two_slices_are_apart_along_data_and_no_other_axis(tpu_compiler):
    config = small(2)
    config.mesh.update(dict(data=2, fsdp=4))
    report = compile_for(config, "v5e:2x2", slices=2)
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    devices = find_target("v5e:2x2", slices=2).devices
    rows = make_mesh(config.mesh, devices).devices
    assert [{device.slice_index for device in row.flat} for row in rows] == [{0}, {1}]
    with pytest.raises(ConfigError, match="mesh.data is 1, but must be a multiple of the 2 slices"):
        make_mesh(dict(data=1, fsdp=-1, tensor=1, context=1), devices)


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_every_remat_policy_compiles_for_a_tpu_and_computes_no_less(tpu_compiler, remat):
    report = compile_for(small(4, remat=remat), "v5e:2x2")
    recomputed = {"none": 0, "dots": 0, "full": 1, "offload": 1}[remat]
    # The kernel of the forward pass runs once a layer and micro-batch, or twice where it is computed again.
    forward = sum(n for kernel, n in report["attention_kernels"].items() if "_fwd" in kernel)
    assert forward == 4 * 2 * (1 + recomputed)
    assert report["fits"]


def test_a_sequence_over_context_keeps_the_kernel_on_tpus(tpu_compiler):
    config = small(2)
    config.seq_len = 1024
    config.mesh.update(dict(data=1, fsdp=2, context=2))
    report = compile_for(config, "v5e:2x2")
    assert report["attention_kernels"].keys() == compile_for(small(2), "v5e:2x2")["attention_kernels"].keys()
    assert report["uncounted"] == {"kernels": {}, "loops": []}


@pytest.mark.parametrize("mixture", ["text=1", "retrieval=1"])  # Rows of one segment, and of several.
def test_gpus_call_cudnn_with_and_without_segments(gpu_compiler, mixture):
    config = small(2)
    config.data.mixture = mixture
    report = compile_for(config, "h100:4")
    assert all(name.startswith("dot_product_attention") for name in report["attention_kernels"])
    assert sum(report["attention_kernels"].values()) >= 2 * 2 * 2  # Forward and backward, layers, micro-batches.


def test_a_prompt_of_64k_tokens_fits_a_v5e_slice_and_memory_grows_no_faster_than_the_prompt(tpu_compiler):
    config = long_context_64k.get_config()
    config.mesh.update(dict(data=1, fsdp=1, tensor=2, context=4))
    target = find_target("v5e:2x4")
    short, long = (generation_report(config, target, n) for n in (16_000, 65_024))
    for report in (short, long):
        assert report["prefill"]["fits"] and report["decode"]["fits"]
    # The 1.1B decoder in bfloat16 over 2 tensor shards, and the cache: less than 2 GiB of a chip's 16.
    assert long["prefill"]["hbm_bytes"]["total"] < 2 * 2**30
    temporaries = [report["prefill"]["hbm_bytes"]["temporaries"] for report in (short, long)]
    assert temporaries[1] < 4 * temporaries[0]
