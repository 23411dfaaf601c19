"""Floating-point operations of single instructions, counting a multiplication and an addition each."""

import functools
import math
import re

import numpy as np

from meap_jax.aot.hlo.text import Instruction, Shape


def product_flops(i: Instruction, operands: list[Shape]) -> int:
    """FLOPs of a matrix product, by the contracted dimensions in XLA's text or, in JSON, in cuBLAS's config."""
    match = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([^}\]]*)', i.attributes)
    if match is None:
        raise ValueError(f"{i.name} = {i.opcode} {i.target()}: no contracted dimensions in {i.attributes[:200]}")
    contracted = [int(d) for d in re.findall(r"\d+", match.group(1))]
    return 2 * math.prod(i.shapes[0].dims) * math.prod(operands[0].dims[d] for d in contracted)


def convolution_flops(i: Instruction, operands: list[Shape]) -> int:
    """FLOPs of a convolution, without those on padding, which TPUs' batched matmuls are full of."""
    lhs, kernel, output = operands[0].dims, operands[1].dims, i.shapes[0].dims
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if match is None:
        raise ValueError(f"{i.name} = convolution: no dim_labels in {i.attributes[:200]}")
    lhs_labels, kernel_labels, output_labels = match.groups()
    window = _window(i.attributes)
    spatial = sorted(label for label in lhs_labels if label.isdigit())
    total = 2 * lhs[lhs_labels.index("b")] * kernel[kernel_labels.index("i")] * kernel[kernel_labels.index("o")]
    for n, label in enumerate(spatial):
        low, _ = map(int, window["pad"][n].split("_")) if "pad" in window else (0, 0)
        total *= _valid_positions(
            lhs[lhs_labels.index(label)],
            kernel[kernel_labels.index(label)],
            output[output_labels.index(label)],
            stride=int(window["stride"][n]) if "stride" in window else 1,
            low=low,
            lhs_dilation=int(window["lhs_dilate"][n]) if "lhs_dilate" in window else 1,
            rhs_dilation=int(window["rhs_dilate"][n]) if "rhs_dilate" in window else 1,
        )
    return total // math.prod(i.numbers("batch_group_count") or [1])


def _window(attributes: str) -> dict[str, list[str]]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = (field.split("=") for field in match.group(1).split()) if match else ()
    return {name: value.split("x") for name, value in fields}


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    lhs: int, kernel: int, output: int, *, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Pairs of an output and a kernel position that meet an element of the input, along one spatial axis."""
    at = np.arange(output)[:, None] * stride + np.arange(kernel) * rhs_dilation - low
    return int(((at >= 0) & (at <= (lhs - 1) * lhs_dilation) & (at % lhs_dilation == 0)).sum())


# Matrix products of the size T x S x d in one run of flash attention's kernels: scores and weighted sum forward; in the
# backward pass the scores again, the gradients of weights and values, and those of keys and queries.
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
_FUSED_BACKWARD_PRODUCTS = 5


def attention_flops(i: Instruction, operands: list[Shape]) -> int | None:
    """FLOPs of a known attention kernel, by its name: splash attention on TPUs, cuDNN's on GPUs; None for others.

    A causal kernel counts at half of all pairs of positions, as model FLOPs do, and splash attention as causal.
    """
    if i.target().startswith("__cudnn$fmha"):
        match = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', i.attributes)
        if match is None:
            return None
        pairs = math.prod(int(d) for d in re.findall(r"\d+", match.group(1)))  # B, H, T, S.
        products = _FUSED_BACKWARD_PRODUCTS if "Backward" in i.target() else 2
        causal = "CAUSAL" in (re.search(r'"mask_type":\s*"(\w+)"', i.attributes) or [""])[0]
        return 2 * pairs * operands[0].dims[-1] * products // (2 if causal else 1)
    splash = re.search(r"splash_m[qh]a_(fwd|dkv|dq)", i.name + i.attributes)
    if splash is None:
        return None
    q, k = [shape for shape in operands if shape.dtype in ("bf16", "f16", "f32") and len(shape.dims) >= 2][:2]
    products = _SPLASH_PRODUCTS[splash.group(1)]
    if (
        splash.group(1) == "dkv"
        and sum(len(shape.dims) >= len(k.dims) and shape.dtype == q.dtype for shape in i.shapes) > 2
    ):
        products = _FUSED_BACKWARD_PRODUCTS  # It gives dq too.
    return math.prod(q.dims) * k.dims[-2] * products  # 2 a multiplication and addition, half of the pairs.


def kernel_name(i: Instruction) -> str:
    """The name of a kernel, without what XLA appends to make it unique."""
    return re.sub(r"[.\d]+$", "", i.name)
