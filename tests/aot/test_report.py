"""The report of ahead-of-time compilation, here for the CPU's devices, and what the command refuses."""

import importlib.util
import json

import jax
import pytest

from meap_jax import config as config_lib
from meap_jax.aot.__main__ import command
from meap_jax.aot.report import compile_report
from meap_jax.aot.targets import Target, find_target, usable_bytes
from meap_jax.errors import ConfigError
from meap_jax.hardware import CHIPS
from meap_jax.metrics import model_flops
from meap_jax.model.config import ModelConfig


def small(num_layers, **model):
    config = config_lib.base()
    sizes = dict(num_layers=num_layers, embed_dim=64, mlp_dim=128, vocab_size=512)
    # Plain attention: what it computes is known to the last product.
    config.model.update(dict(attention="plain") | sizes | model)
    config.objective.mask_id = 3
    config.global_batch_size, config.grad_accum_steps, config.seq_len = 16, 2, 64
    config.mesh.update(data=1, fsdp=-1)
    return config


def report_here(config):
    return compile_report(config, Target(jax.devices(), CHIPS["v5e"], "tpu"))


def counted_in_full(config):
    tokens = config.global_batch_size * config.seq_len
    return model_flops(ModelConfig.of(config.model), config.seq_len, tokens, causal=False)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_scanned_and_unrolled_layers_count_as_the_model_does(num_layers):
    """Without recomputation a step has the model's FLOPs, with attention in full, and no others."""
    for unroll in (1, num_layers):
        config = small(num_layers, unroll=unroll)
        assert report_here(config)["compiled_flops"] == counted_in_full(config)


def test_a_step_of_mir_has_twice_the_flops_for_its_masked_copies():
    config = small(2)
    config.objective.name = "mir"
    report, of_meap = report_here(config), report_here(small(2))
    assert report["model_flops"] == 2 * of_meap["model_flops"]
    assert report["compiled_flops"] == 2 * of_meap["compiled_flops"]


def test_recomputation_shows_in_the_ratio():
    """A layer's backward pass repeats its forward pass but for the last product, whose result nobody needs again."""
    config = small(3, remat="full")
    m, tokens = config.model, config.global_batch_size * config.seq_len
    linear = 2 * m.embed_dim * (m.num_heads + m.num_kv_heads) * m.head_dim + 2 * m.embed_dim * m.mlp_dim
    again = m.num_layers * tokens * (2 * linear + 4 * m.num_heads * m.head_dim * config.seq_len)
    assert report_here(config)["compiled_flops"] == counted_in_full(config) + again


def test_the_report_adds_up():
    config = small(2)
    report = report_here(config)
    memory, chip = report["hbm_bytes"], CHIPS["v5e"]
    assert json.loads(json.dumps(report)) == report
    assert report["devices"] == 8
    assert report["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert memory["arguments"] == pytest.approx(12 * report["parameters"] / 8, rel=0.2)
    kept = memory["arguments"] + memory["outputs"] - memory["aliased"]
    assert memory["total"] == kept + memory["temporaries"] + memory["code"]
    assert report["fits"] and report["hbm_capacity"] == chip.hbm_bytes
    assert report["compiled_over_model_flops"] == report["compiled_flops"] / report["model_flops"]
    sent = sum(traffic["bytes"] for traffic in report["collectives"].values())
    assert report["roofline"] == {
        "compute": report["compiled_flops"] / 8 / chip.peak_flops,
        "memory": report["bytes_accessed"] / chip.hbm_bandwidth,
        "communication": sent / chip.ici_bandwidth,
    }
    assert report["step_seconds"] == max(report["roofline"].values())
    rate = report["model_flops"] / report["step_seconds"] / 8
    assert report["mfu_bound"] == pytest.approx(rate / chip.peak_flops)


def test_a_gpu_offers_the_share_that_jax_takes_of_it(monkeypatch):
    target = Target(jax.devices(), CHIPS["h100"], "cuda")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert usable_bytes(target) == 60 * 10**9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert usable_bytes(target) == 72 * 10**9


KNOWN = "--topology is .* but must be one of v5e:2x4, .*h100:8"


@pytest.mark.parametrize(
    "topology, slices, sentence",
    [(name, 1, KNOWN) for name in ("v9:2x2", "v5e", "v5e:8", "h100:9", "h100:0", "h100:2x4", "tpu", "")]
    + [("h100:8", 2, "--slices is 2, but must be"), ("v5e:2x2", 0, "--slices is 0, but must be")],
)
def test_an_unknown_topology_is_answered_with_the_known_ones_and_slices_are_of_tpus(topology, slices, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_target(topology, slices)


@pytest.mark.parametrize(
    "topology, module, file",
    [("v5e:2x2", "libtpu", "requirements-tpu-aot.txt"), ("h100:8", "jax_plugins", "requirements-gpu-aot.txt")],
)
def test_a_compiler_that_is_missing_is_named_with_the_way_to_get_it(topology, module, file):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(ConfigError, match=f"is not installed .* pip install --no-deps -r {file}"):
        find_target(topology)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--topology is not set"),
        (["--topology=v9:1"], "--topology is 'v9:1'"),
        (["--topology=v5e:8x8", "--mesh=rows=2"], "--mesh is 'rows=2', but must be axis=size"),
        (["--topology=v5e:8x8", "--mesh=fsdp=0"], "--mesh is 'fsdp=0', but must be axis=size"),
        (["--topology=v5e:8x8", "--mesh=data=-1"], "only one axis may be -1"),
        (["--topology=v5e:8x8", "--slices=two"], "two"),
        (["--topology=v5e:8x8", "--config.model.num_layers=0"], "model.num_layers is 0"),
        (["--topology=v5e:8x8", "--nonsense"], "nonsense"),
    ],
)
def test_what_the_command_refuses(arguments, sentence):
    """No data is needed to come so far: the paper's configs leave data.path to be set."""
    with pytest.raises(ConfigError, match=sentence):
        command(["aot", "--config=configs/meap_100m.py", *arguments])
