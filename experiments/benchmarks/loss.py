"""What the chunked loss saves in memory, and what it costs in time.

python -m experiments.benchmarks.loss [--repeats=N] [--quick] [--json=FILE]

Loss and its gradient in x and in the head, compiled: `losses.linear_cross_entropy` in chunks of positions against
optax's cross-entropy of all logits. Memory is `memory_analysis().temp_size_in_bytes` of the compiled program, for rows
of the paper (T = 4096, D = 2048, V = 32064); time is measured at a size that a CPU does in a second.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import harness
from experiments.benchmarks.timing import interleave, timed
from experiments.benchmarks.workload import temp_bytes
from meap_jax.losses import linear_cross_entropy

CHUNKS = (256, 512, 2048)


class Shape(NamedTuple):
    """Of the last hidden states [B, T, D] and the head [D, V]."""

    B: int
    T: int
    D: int
    V: int


PAPER = Shape(1, 4096, 2048, 32_064)
TIMED = Shape(1, 2048, 512, 8192)
QUICK = Shape(1, 64, 16, 128)


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    chunks = (16, 32) if args.quick else CHUNKS
    return [
        _memory(QUICK if args.quick else PAPER, chunks),
        _time(QUICK if args.quick else TIMED, chunks, args.repeats),
    ]


def _memory(shape: Shape, chunks: tuple[int, ...]) -> harness.Table:
    rows: list[dict[str, Any]] = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for B in (1, 4):
            arguments = _arguments(shape._replace(B=B), dtype)
            plain, *chunked = (temp_bytes(loss_and_gradients(c).lower(*arguments).compile()) for c in (None, *chunks))
            rows += [
                {
                    "dtype": dtype.__name__,
                    "B": B,
                    "chunk": chunk,
                    "plain, temp MiB": plain / 2**20,
                    "chunked, temp MiB": temp / 2**20,
                    "chunked / plain": temp / plain,
                }
                for chunk, temp in zip(chunks, chunked, strict=True)
            ]
    return harness.Table(
        f"Memory of loss and gradients, T = {shape.T}, D = {shape.D}, V = {shape.V}",
        rows,
        "In the chunked loss are the gradient of the head, in float32, and that of x. A CPU multiplies bfloat16 as "
        "float32, so that the compiler adds copies of the head which a TPU or GPU does not need.",
    )


def _time(shape: Shape, chunks: tuple[int, ...], repeats: int) -> harness.Table:
    keys = jax.random.split(jax.random.key(0), 3)
    x, head, targets, weights = _arguments(shape, jnp.float32)
    values = (
        jax.random.normal(keys[0], x.shape),
        jax.random.normal(keys[1], head.shape) * shape.D**-0.5,
        jax.random.randint(keys[2], targets.shape, 0, shape.V, jnp.int32),
        jnp.ones(weights.shape),
    )

    def turn(chunk: int | None) -> Callable[[], float]:
        program = loss_and_gradients(chunk)
        return timed(lambda: program(*values))

    timings = interleave({str(chunk): turn(chunk) for chunk in (None, *chunks)}, rounds=repeats)
    rows = [{"chunk": chunk, "chunked / plain": timings.ratio(str(chunk), str(None))} for chunk in chunks]
    return harness.Table(f"Time of loss and gradients, float32, T = {shape.T}, D = {shape.D}, V = {shape.V}", rows)


def loss_and_gradients(chunk_size: int | None) -> jax.stages.Wrapped:
    """(x [B, T, D], head [D, V], targets [B, T], weights [B, T]) -> summed loss and its gradients in x and head.

    Args:
      chunk_size: None is the plain loss, which holds all logits.
    """

    def loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        if chunk_size is None:
            logits = (x @ head).astype(jnp.float32)
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)
        return linear_cross_entropy(x, head, targets, weights, chunk_size=chunk_size)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def _arguments(shape: Shape, dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((shape.B, shape.T, shape.D), dtype),
        jax.ShapeDtypeStruct((shape.D, shape.V), dtype),
        jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32),
        jax.ShapeDtypeStruct((shape.B, shape.T), jnp.float32),
    )


command = harness.main("loss", __doc__, measure, repeats=7)

if __name__ == "__main__":
    harness.run(command)
