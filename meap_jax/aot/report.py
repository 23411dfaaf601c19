"""Compiles the training step of a config for a target and reports its memory and bounds on its speed."""

import importlib.metadata
import logging
import re
import time
from typing import Any

import jax
import ml_collections

from meap_jax.aot import hlo
from meap_jax.aot.generation import NUM_NEW, lowered_programs
from meap_jax.aot.targets import Target, find_target, usable_bytes
from meap_jax.metrics import model_flops
from meap_jax.models import define_model
from meap_jax.objective import Objective
from meap_jax.run import versions
from meap_jax.train import abstract_inputs, compile_step

_log = logging.getLogger("meap_jax.aot")

# Fields of a report that are None for a program that does not fit.
OF_THE_PROGRAM = (
    "compiled_flops compiled_over_model_flops bytes_accessed collectives attention_kernels uncounted roofline "
    "step_seconds mfu_bound".split()
)
COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")


def compile_for(
    config: ml_collections.ConfigDict, topology: str, slices: int = 1, prompt_len: int | None = None
) -> dict[str, Any]:
    """Reports on the step, or on generation after `prompt_len` tokens, for a topology such as v5e:8x8 or h100:8."""
    jax.config.update("jax_platforms", "cpu")  # Before a device is touched: a TPU or GPU that is here is not used.
    target = find_target(topology, slices)
    jax.config.update("jax_enable_compilation_cache", False)  # compile_seconds are to be those of compiling.
    _log.info("compiling for %d %s; this takes a minute or more", len(target.devices), target.chip.name)
    report = compile_report(config, target) if prompt_len is None else generation_report(config, target, prompt_len)
    _log.info("compiled in %.0f s", report["compile_seconds"])
    return {"topology": topology, "slices": slices} | report


def compile_report(config: ml_collections.ConfigDict, target: Target) -> dict[str, Any]:
    """Compiles the step of a config for a target and reports on it.

    Args:
      config: checked by `meap_jax.config.check`; its data is not read.
      target: from `find_target`.

    Returns:
      What the command prints; see docs/performance.md. Of a program that a TPU's compiler refuses for want of memory,
      `hbm_bytes` has the total alone, from the compiler's message, and what depends on the program is None.

    Raises:
      ConfigError: if mesh and batch don't fit the devices.
    """
    chip = target.chip
    _, mesh, definition = define_model(config, devices=target.devices)
    num_tokens = config.global_batch_size * config.seq_len * Objective.of(config).num_passes
    wanted = model_flops(definition.config, config.seq_len, num_tokens)
    report: dict[str, Any] = {
        "devices": mesh.size,
        "chip": chip.name,
        "mesh": dict(mesh.shape),
        "parameters": definition.config.num_parameters,
        "hbm_bytes": None,
        "hbm_capacity": usable_bytes(target),
        "fits": False,
        "model_flops": wanted,
        **dict.fromkeys(OF_THE_PROGRAM),
    }
    step: Any = compile_step(config, definition, mesh)  # Any: typed as a function, it is one of jax.jit.
    inputs = abstract_inputs(config, definition, mesh)
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        compiled, memory = compile_or_size(step.lower(*inputs))
    report |= {"hbm_bytes": memory, "compile_seconds": time.monotonic() - begin, "versions": all_versions()}
    if compiled is None:
        return report

    # On TPUs memory space 1 is on the chip; on GPUs it is the memory that collectives use, in the main one.
    costs = hlo.analyze(compiled.as_text(), mesh.size, hbm_spaces=(0,) if target.platform == "tpu" else (0, 1))
    roofline = {
        "compute": costs.flops / chip.peak_flops,
        "memory": costs.bytes / chip.hbm_bandwidth,
        "communication": costs.sent.total() / chip.ici_bandwidth,
    }
    bound = max(roofline.values())
    return report | {
        "fits": memory["total"] <= report["hbm_capacity"],
        "compiled_flops": costs.flops * mesh.size,
        "compiled_over_model_flops": costs.flops * mesh.size / wanted,
        "bytes_accessed": costs.bytes,
        "collectives": {
            kind: {"count": count, "bytes": costs.sent[kind]} for kind, count in sorted(costs.collectives.items())
        },
        "attention_kernels": dict(costs.kernels),
        "uncounted": {"kernels": dict(costs.unknown_kernels), "loops": sorted(costs.unknown_loops)},
        "roofline": roofline,
        "step_seconds": bound,
        "mfu_bound": wanted / (bound * chip.peak_flops * mesh.size),
    }


def generation_report(config: ml_collections.ConfigDict, target: Target, prompt_len: int) -> dict[str, Any]:
    """Compiles prefill and decoding of a config for a target and reports on their memory.

    Args:
      config: checked; its data is not read.
      target: from `find_target`.
      prompt_len: tokens of each row's prompt.

    Returns:
      {"prefill": {"hbm_bytes": ..., "fits": ...}, "decode": the same, ...}; one row for each device of data x fsdp.

    Raises:
      ConfigError: if mesh and prompt don't fit the devices or the model.
    """
    model = define_model(config, devices=target.devices)
    report: dict[str, Any] = {
        "devices": model.mesh.size,
        "chip": target.chip.name,
        "mesh": dict(model.mesh.shape),
        "parameters": model.definition.config.num_parameters,
        "prompt_tokens": prompt_len,
        "new_tokens": NUM_NEW,
        "hbm_capacity": usable_bytes(target),
    }
    begin = time.monotonic()
    for name, lowered in lowered_programs(model, prompt_len):
        compiled, memory = compile_or_size(lowered)
        report[name] = {"hbm_bytes": memory, "fits": compiled is not None and memory["total"] <= report["hbm_capacity"]}
    return report | {"compile_seconds": time.monotonic() - begin, "versions": all_versions()}


def compile_or_size(lowered: Any) -> tuple[Any, dict[str, int]]:
    """Compiles a program; returns it and its memory, or None and the total that a TPU's compiler refused."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return None, {"total": _bytes_asked_for(error)}
    return compiled, _memory(compiled.memory_analysis())


def all_versions() -> dict[str, str]:
    """`run.versions`, and those of the compilers."""
    compilers = {name: found.version for name in COMPILERS for found in importlib.metadata.distributions(name=name)}
    return versions() | compilers


def _memory(stats: Any) -> dict[str, int]:
    """Bytes of one device; donated arrays are both arguments and outputs, and count once."""
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values()) - 2 * sizes["aliased"]}


def _bytes_asked_for(error: jax.errors.JaxRuntimeError) -> int:
    """The memory of a program that does not fit, from a TPU compiler's error; any other error is raised again.

    Either "Ran out of memory in memory space hbm. Used 20.05G of 15.75G hbm", or before it comes so far "the total
    memory required for HLO temporaries (43.72G) exceeds available HBM (15.75G)".
    """
    match = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMG])\b", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
        raise error
    return int(float(match.group(1)) * 1024 ** ("KMG".index(match.group(2)) + 1))
