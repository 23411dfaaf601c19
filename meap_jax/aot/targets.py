"""Devices of accelerators that this machine lacks, to compile for, from a name such as v5e:8x8 or h100:8.

TPU programs are compiled by libtpu, GPU programs by JAX's CUDA plugin; neither needs its hardware.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

import jax
from jax.experimental import topologies

from meap_jax.errors import ConfigError
from meap_jax.hardware import CHIPS, Chip

TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS_A_HOST = 8
KNOWN = (
    "v5e:2x4, v6e:4x4, v5p:2x2x1, v4:2x2x4 (chips along each axis, up to 16x16 on v5e and v6e), "
    "a100:8, h100:8, h200:8 or b200:8 (1 to 8 GPUs of one host)"
)


class Target(NamedTuple):
    """What a program is compiled for."""

    devices: list[jax.Device]  # Abstract: they take programs, no data.
    chip: Chip
    platform: str  # "tpu" or "cuda".


class _GPU(NamedTuple):
    """A GPU as XLA's compiler describes it, without what the last three generations share."""

    name: str
    compute_capability: tuple[int, int]
    features: str  # NONE, or ACCELERATED_FEATURES: the instructions of exactly this generation (wgmma, tcgen05).
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory_bytes: int  # What the driver reports, which is above the round figure of the data sheet.
    bandwidth: int  # bytes/s.
    l2_bytes: int
    shared_bytes: int  # A core has this much; a block may have 1 KiB less.
    nvlinks: int


# From the device descriptions that XLA ships: openxla/xla, xla/backends/gpu/target_config/specs.
_GPUS: Mapping[str, _GPU] = {
    "a100": _GPU(
        "NVIDIA A100-SXM4-80GB", (8, 0), "NONE", 108, 64, 1.41,
        85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936, 12,
    ),
    "h100": _GPU(
        "NVIDIA H100 80GB HBM3", (9, 0), "ACCELERATED_FEATURES", 132, 128, 1.98,
        84_942_979_072, 3_352_320_000_000, 52_428_800, 233_472, 18,
    ),
    "h200": _GPU(
        "NVIDIA H200", (9, 0), "ACCELERATED_FEATURES", 132, 128, 1.98,
        151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472, 18,
    ),
    "b200": _GPU(
        "NVIDIA B200", (10, 0), "ACCELERATED_FEATURES", 148, 128, 1.965,
        191_514_411_008, 7_672_320_000_000, 132_644_864, 233_472, 18,
    ),
}  # fmt: skip


def find_target(topology: str, slices: int = 1) -> Target:
    """The devices of a topology.

    Args:
      topology: `v5e:8x8` (chips along each axis of the torus) or `h100:8` (GPUs of one host).
      slices: how many such TPU slices there are, joined by the data-centre network.

    Raises:
      ConfigError: if there is no such topology, or the compiler for it is not installed.
    """
    kind, _, size = topology.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", size) and slices >= 1:
        return Target(_tpu_devices(kind, size, slices), CHIPS[kind], "tpu")
    if kind in _GPUS and re.fullmatch(r"[1-9]", size) and int(size) <= GPUS_A_HOST and slices == 1:
        return Target(_gpu_devices(_GPUS[kind], int(size)), CHIPS[kind], "cuda")
    if slices != 1:
        raise ConfigError(f"--slices is {slices}, but must be 1 or more for TPUs and 1 for GPUs.")
    raise ConfigError(f"--topology is {topology!r}, but must be one of {KNOWN}.")


def usable_bytes(target: Target) -> int:
    """Memory of one device that JAX gives to programs.

    All of a TPU's, whose compiler refuses what doesn't fit. On GPUs the share that JAX allocates when it starts, which
    XLA_PYTHON_CLIENT_MEM_FRACTION sets (default: 0.75).
    """
    if target.platform == "tpu":
        return target.chip.hbm_bytes
    return int(float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75) * target.chip.hbm_bytes)


def _tpu_devices(kind: str, size: str, slices: int) -> list[jax.Device]:
    _require(("libtpu",), "libtpu", "requirements-tpu-aot.txt")
    # Unless these are set, libtpu asks a server which TPU this machine has. What is compiled for doesn't depend on it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Else it locks the TPU, which is not used.
    options: dict = {"num_slices": slices} if slices > 1 else {}
    if size == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # Its two cores are one device of JAX.
    try:
        return list(topologies.get_topology_desc(f"{kind}:{size}", platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(f"--topology is {kind}:{size}, which libtpu refuses ({reason}); try {KNOWN}.") from error


def _gpu_devices(gpu: _GPU, num: int) -> list[jax.Device]:
    _require(("jax_plugins.xla_cuda13", "nvidia.cudnn"), "JAX's CUDA plugin", "requirements-gpu-aot.txt")
    if shutil.which("ptxas") is None:
        toolkit = next((p for p in import_module("nvidia").__path__ if os.path.exists(f"{p}/cu13/bin/ptxas")), None)
        if toolkit is None:
            raise ConfigError(
                "ptxas, the assembler of NVIDIA's CUDA toolkit, is not on the PATH: "
                "pip install --no-deps -r requirements-gpu-aot.txt brings it."
            )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={toolkit}/cu13".strip()
    target = _target_config(gpu)
    return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{num}").devices)


def _target_config(gpu: _GPU) -> str:
    """A GpuTargetConfigProto (xla/stream_executor/device_description.proto) in protobuf's text format."""
    major, minor = gpu.compute_capability
    return f"""
        gpu_device_info {{
          name: "{gpu.name}"
          cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {gpu.features} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.fpus_per_core}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory_bytes}
          memory_bandwidth: {gpu.bandwidth}
          l2_cache_size: {gpu.l2_bytes}
          shared_memory_per_core: {gpu.shared_bytes}
          shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
          shared_memory_per_block: 49152
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          device_interconnect_info {{ active_links: {gpu.nvlinks} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 }}
        device_description_str: "{gpu.name}"
    """


def _require(modules: tuple[str, ...], what: str, requirements: str) -> None:
    for module in modules:
        parent, _, _ = module.rpartition(".")
        if (parent and importlib.util.find_spec(parent) is None) or importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{what} is not installed ({module} is missing), which compiles this: "
                f"pip install --no-deps -r {requirements} brings it."
            )
