"""What masking costs: a MEAP step against an NTP step, and mask_tokens alone.

python -m experiments.benchmarks.masking [--repeats=N] [--quick] [--json=FILE]

Both steps are `train.compile_step` of one config but for `objective.name`, on the same batch. mask_tokens is timed on
the [64, 4096] ids of a micro-batch of the paper; as a share of the step, token for token, of the 10M decoder at
T = 512 timed beside it. The 1.1B decoder of the paper does about a hundred times that arithmetic for a token.
"""

import argparse

import jax

from experiments.benchmarks import harness
from experiments.benchmarks.timing import Ratio, interleave, timed
from experiments.benchmarks.workload import Workload, config_of, random_tokens
from meap_jax.masking import STRATEGIES, mask_tokens

# Decoder, T, B.
STEPS = (("1M", 256, 8), ("10M", 512, 8))
PAPER_ROWS, PAPER_SEQ_LEN = 64, 4096


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    steps = (("tiny", 32, 2),) if args.quick else STEPS
    rows = [_meap_over_ntp(*sizes, args.repeats) for sizes in steps]
    rows_T = (4, 128) if args.quick else (PAPER_ROWS, PAPER_SEQ_LEN)
    return [
        harness.Table("MEAP step over NTP step, seconds", rows),
        harness.Table(
            f"mask_tokens of [{rows_T[0]}, {rows_T[1]}] ids alone, ratio 0.15",
            _alone(*rows_T, steps[-1], args.repeats),
            "The share is of the seconds that a train step of that decoder takes for as many tokens.",
        ),
    ]


def _meap_over_ntp(size: str, seq_len: int, batch_size: int, repeats: int) -> dict[str, object]:
    workloads = {}
    for objective in ("meap", "ntp"):
        config = config_of(size, seq_len=seq_len, batch_size=batch_size)
        config.objective.name = objective
        workloads[objective] = Workload(config)
    timings = interleave({name: timed(w.step) for name, w in workloads.items()}, rounds=repeats, warmup=2)
    return {
        "decoder": size,
        "T": seq_len,
        "B": batch_size,
        "MEAP / NTP": timings.ratio("meap", "ntp"),
        "NTP tokens/s": workloads["ntp"].num_tokens / timings.median("ntp"),
    }


def _alone(rows: int, seq_len: int, step: tuple[str, int, int], repeats: int) -> list[dict[str, object]]:
    size, step_len, batch_size = step
    workload = Workload(config_of(size, seq_len=step_len, batch_size=batch_size))
    ids = jax.numpy.asarray(random_tokens(config_of("1M", seq_len=seq_len - 1, batch_size=rows)))
    key = jax.random.key(0)

    def masking(strategy: str):
        masked = jax.jit(lambda key, ids: mask_tokens(key, ids, 0.15, mask_id=3, strategy=strategy))
        return timed(lambda: masked(key, ids))

    turns = {"step": timed(workload.step), **{strategy: masking(strategy) for strategy in STRATEGIES}}
    timings = interleave(turns, rounds=repeats, warmup=2)
    tokens_share = workload.num_tokens / ids.size
    return [
        {
            "strategy": strategy,
            f"share of a step ({size}, T = {step_len})": Ratio(
                *(tokens_share * r for r in timings.ratio(strategy, "step"))
            ),
            "milliseconds": 1e3 * timings.median(strategy),
        }
        for strategy in STRATEGIES
    ]


command = harness.main("masking", __doc__, measure, repeats=31)

if __name__ == "__main__":
    harness.run(command)
