"""Peak rates of chips, as their makers state them: what MFU and rooflines are measured against."""

from collections.abc import Mapping
from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
    """One accelerator, which is one device of JAX.

    The interconnect is what the chip can send over all its links at once: one way, bytes/s. Makers print the sum of
    both ways (Google's "bidirectional bandwidth per chip", NVIDIA's NVLink total), which is twice that. Memory is what
    the chip has; a runtime keeps some of it to itself (a v5e offers programs 15.75 of its 16 GiB).
    """

    name: str
    peak_flops: float  # bfloat16 matrix products, dense (NVIDIA prints twice that, "with sparsity"): FLOP/s.
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s.
    ici_bandwidth: float  # ICI or NVLink, one way, all links: bytes/s.
    device_kinds: tuple[
        str, ...
    ]  # As jax.Device.device_kind says it; for TPUs as in jax/_src/pallas/mosaic/tpu_info.py.


# jax-ml.github.io/scaling-book/tpus has the TPU figures too, with 4.5e10 bytes/s a link of v4 and v5e and 9e10 of v5p
# and v6e: a tenth below 5e10 and 1e11, which Google's figures divided by the links of a chip (6 on v4 and v5p, 4 on
# v5e and v6e) come to. The unit of HBM, GiB, is that of jax/_src/pallas/mosaic/tpu_info.py.
#
# v4: cloud.google.com/tpu/docs/v4; links: arxiv.org/abs/2304.01433, Table 4 (6 x 50 GB/s)
# v5e: cloud.google.com/tpu/docs/v5e
# v5p: cloud.google.com/tpu/docs/v5p-training
# v6e: cloud.google.com/tpu/docs/v6e
# a100: NVIDIA A100 Tensor Core GPU data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4), SXM
# a100-40gb: NVIDIA A100 Tensor Core GPU Architecture white paper, SXM4 with 40 GB
# h100, h200: NVIDIA H100 and H200 Tensor Core GPU data sheets, SXM: bf16 1,979 TFLOPS with sparsity
# b200: NVIDIA Blackwell architecture technical brief and DGX B200 data sheet (8 GPUs, 1,440 GB): HGX B200, 1,000 W
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1200e9, 300e9, ("TPU v4",)),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, ("TPU v5", "TPU v5p")),
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 400e9, ("TPU v6 lite", "TPU v6e")),
        Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, ("NVIDIA A100-SXM4-80GB",)),
        Chip("a100-40gb", 312e12, 40 * 10**9, 1555e9, 300e9, ("NVIDIA A100-SXM4-40GB",)),
        Chip("h100", 989.4e12, 80 * 10**9, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",)),
        Chip("h200", 989.4e12, 141 * 10**9, 4800e9, 450e9, ("NVIDIA H200",)),
        Chip("b200", 2250e12, 180 * 10**9, 8000e9, 900e9, ("NVIDIA B200",)),
    )
}


def detect(device_kind: str) -> Chip | None:
    """The chip of a device.

    Args:
      device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".

    Returns:
      None for a name that is not known to the letter: the PCIe and NVL boards and the MIG slices of a GPU have other
      figures than its SXM board, and no MFU is better than a wrong one.
    """
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
