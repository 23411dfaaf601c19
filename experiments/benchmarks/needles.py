"""The needle grid with beginnings that are read once, beside the same prompts read one by one.

python -m experiments.benchmarks.needles [--sizes=1M,10M] [--lengths=4096,8192] [--repeats=N] [--quick] [--json=FILE]

One length of the grid: 11 depths from 0 to 100 %, as many rows as trials, 50 new tokens each. Prompts that share a
text differ from their needle on; `Generator.generate_sharing` reads what comes before it once. Where chunks are
small against the length, 6.5 of 11 prompts are left to be read: a ratio of 0.59 for what costs the same for each token,
and of 0.70 for attention, whose later tokens cost more.
"""

import argparse
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.timing import interleave, timed
from experiments.benchmarks.workload import checked_sizes, config_of
from meap_jax import sharding, tokenizers
from meap_jax.generator import Generator
from meap_jax.models import fresh_model

DEPTHS, NUM_NEW, CHUNK = 11, 50, 512


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The table of this benchmark."""
    lengths = [256] if args.quick else [int(length) for length in args.lengths.split(",")]
    rows = [_row(size, T, args) for size in checked_sizes(args) for T in lengths]
    note = f"Chunks of {CHUNK} tokens. Ratios are of times: below 1, sharing is the faster."
    return [harness.Table(f"One length of the needle grid, {DEPTHS} depths, {args.trials} trials", rows, note)]


def _row(size: str, T: int, args: argparse.Namespace) -> dict[str, Any]:
    config = config_of(size, seq_len=T + NUM_NEW, batch_size=args.trials)
    tokenizer = tokenizers.train_bpe(["a text of few words"], max(config.model.vocab_size, 300))
    config.model.vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
    one_device = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    opened = fresh_model(config, one_device)
    chunk, num_new = (32, 4) if args.quick else (CHUNK, NUM_NEW)
    generator = Generator(opened.model, opened.params, tokenizer, batch_size=args.trials, chunk=chunk)
    rng = np.random.default_rng(0)
    texts, needle = rng.integers(4, 260, (args.trials, T - 16)), rng.integers(4, 260, 16)
    batches = []
    for depth in reversed(range(DEPTHS)):
        place = (T - 16) * depth // (DEPTHS - 1)
        batches.append([[*text[:place].tolist(), *needle.tolist(), *text[place:].tolist()] for text in texts])
    ends: dict[str, Any] = dict(max_new_tokens=num_new)
    outputs = {
        "shared": lambda: list(generator.generate_sharing(batches, **ends)),
        "one by one": lambda: [generator.generate(batch, **ends) for batch in batches],
    }
    first = {name: output() for name, output in outputs.items()}
    timings = interleave({name: timed(output) for name, output in outputs.items()}, rounds=args.repeats)
    same = np.mean(
        [a.tokens == b.tokens for x, y in zip(*first.values(), strict=True) for a, b in zip(x, y, strict=True)]
    )
    return {
        "decoder": size,
        "T": T,
        "shared / one by one, time": timings.ratio("shared", "one by one"),
        "texts that agree": float(same),
        "shared, s": timings.median("shared"),
    }


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="1M,10M", help="decoders, of workload.SIZES")
    parser.add_argument("--lengths", default="4096,8192", help="tokens of a prompt")
    parser.set_defaults(no_torch=True)  # Ours alone.
    parser.add_argument("--trials", type=int, default=2, help="prompts of a depth")


command = harness.main("needles", __doc__, measure, repeats=3, add_flags=_add_flags)

if __name__ == "__main__":
    harness.run(command)
