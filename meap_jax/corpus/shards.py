"""Turns a source into a store: shard by shard, on all cores, and after an interruption from where it was.

A shard is made from a few consecutive parts of the source by one process, and has its name, with a summary
beside it, only when it is complete. Nothing in it depends on who made it or when: any number of workers, or of
interruptions, gives the same store.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from meap_jax import tokenizers
from meap_jax.corpus.documents import encode
from meap_jax.corpus.sources import Source
from meap_jax.corpus.workers import worker_pool
from meap_jax.data.store import completed, ids_dtype, shard_file, write_shard
from meap_jax.errors import DataError
from meap_jax.files import parse_json
from meap_jax.readers import Part, Skips

SHARD_BYTES = 64 << 20  # Of text, about; compressed or not, as the files are.
_FEW = 10  # Bad records of a source are no reason to stop, however small it is.
_ONE_PROCESS = 4 << 20  # Below, workers take longer to start than one takes to be done.

_load_tokenizer = functools.lru_cache(maxsize=1)(tokenizers.load)
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One shard to be made."""

    source: Source
    parts: tuple[Part, ...]
    folder: Path  # Of the store.
    shard: int
    tokenizer: Path  # The folder that it is loaded from.
    max_skipped: int


def jobs(source: Source, folder: Path, tokenizer: Path, max_skipped: int) -> list[Job]:
    """The shards of a source, each of consecutive parts until `SHARD_BYTES` are reached.

    Raises:
      DataError: the folder holds shards of other parts: the source has changed since they were made.
    """
    groups: list[list[Part]] = []
    room = 0
    for part in source.parts():
        if room <= 0:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(part)
        room -= max(part.num_bytes, 1)
    planned = [Job(source, tuple(group), folder, i, tokenizer, max_skipped) for i, group in enumerate(groups)]
    for job in planned:
        summary = read_summary(job)
        if summary is not None and summary["parts"] != _described(job.parts):
            raise DataError(
                f"{shard_file(folder, job.shard)} was made from {summary['parts'][0]}, and now comes "
                f"{_described(job.parts)[0]}: the source has changed since. Delete {folder} to begin anew."
            )
    return planned


Summary = dict[str, Any]  # Of a shard: what it holds and what it was made from.
# Makes shards, and gives each with its summary once it is done, in any order. Where the caller leaves the context
# early, the rest need not be made.
ShardMaker = Callable[[Sequence[Job]], contextlib.AbstractContextManager[Iterator[tuple[Job, Summary]]]]


def run_jobs(planned: Sequence[Job], shard_maker: ShardMaker, name: str) -> list[Summary]:
    """Makes the shards that are not there yet, and returns the summaries of all.

    Args:
      planned: the shards.
      shard_maker: makes those that it is given.
      name: of the source, for the progress bar.

    Raises:
      DataError: more bad records than `max_skipped` in all, or a source that can't be read.
      OSError: the disk is full. What is complete stays in each case.
    """
    summaries = {job.shard: summary for job in planned if (summary := read_summary(job))}
    todo = [job for job in planned if job.shard not in summaries]
    if summaries and todo:
        _log.info("%s: %d of %d shards are there, going on", name, len(summaries), len(planned))
    total = sum(map(_num_bytes, planned))
    done = total - sum(map(_num_bytes, todo))
    tokens, skipped = 0, Counter[str]()

    def count(summary: Summary) -> None:
        nonlocal tokens
        tokens += summary["tokens"]
        skipped.update(summary["skipped"])
        if skipped.total() > (limit := planned[0].max_skipped):
            raise DataError(
                f"{skipped.total()} records of {name} can't be used, more than data.max_skipped = {limit}: "
                f"{skips_by_reason(skipped, (summaries[shard] for shard in sorted(summaries)))}"
            )

    for summary in summaries.values():  # Of shards that are there already, made before this limit perhaps.
        count(summary)
    bar = tqdm(desc=f"tokenizing {name}", total=total or None, initial=done, unit="B", unit_scale=True, disable=None)
    with bar, shard_maker(todo) as results:
        for job, summary in results:
            summaries[job.shard] = summary
            count(summary)
            bar.update(_num_bytes(job))
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
    return [summaries[job.shard] for job in planned]


def check_share(name: str, summaries: Sequence[Summary], most: float) -> None:
    """Stops where a large share of a source is bad: its form is another one than the config says.

    Args:
      name: of the source.
      summaries: of all its shards.
      most: share of its records, data.max_skipped_share. A few bad records are none too many, whatever their share.

    Raises:
      DataError: with counts by reason.
    """
    skipped = sum((Counter(summary["skipped"]) for summary in summaries), Counter[str]())
    bad, good = skipped.total(), sum(summary["documents"] for summary in summaries)
    if good and bad > _FEW and bad > most * (bad + good):  # Of a source without any good ones more can be said.
        raise DataError(
            f"{bad:,} of {bad + good:,} records of {name} can't be used, more than the share data.max_skipped_share = "
            f"{most:g}: {skips_by_reason(skipped, summaries)}"
        )


def skips_by_reason(skipped: Mapping[str, int], summaries: Iterable[Mapping[str, Any]]) -> str:
    """Counts of bad records by reason, each with the place of the first."""
    first = {k: place for s in reversed(list(summaries)) for k, place in s["skipped_first"].items()}
    return "; ".join(f"{count} x {reason} (first: {first[reason]})" for reason, count in sorted(skipped.items())) + "."


def make_shard(job: Job) -> Summary:
    """Makes one shard; returns its summary, which is written last.

    Raises:
      DataError, OSError: as `run_jobs`.
    """
    tokenizer = _load_tokenizer(job.tokenizer)
    skips = Skips(job.max_skipped)
    dtype = ids_dtype(tokenizer.num_tokens)
    read = chain.from_iterable(job.source.read(part, skips) for part in job.parts)
    written = write_shard(job.folder, job.shard, encode(read, tokenizer, skips), dtype)
    summary = {
        **written._asdict(),
        "bytes": shard_file(job.folder, job.shard).stat().st_size,
        "parts": _described(job.parts),
        "skipped": dict(skips.counts),
        "skipped_first": dict(skips.first),
    }
    with completed(summary_file(job)) as partial:
        partial.write_text(json.dumps(summary), encoding="utf-8")
    return summary


@contextlib.contextmanager
def run_here(todo: Sequence[Job], workers: int) -> Iterator[Iterator[tuple[Job, Summary]]]:
    """A `ShardMaker` on this machine, with processes at most; in this process where others would not pay."""
    workers = min(workers, len(todo))
    if workers <= 1 or sum(map(_num_bytes, todo)) < _ONE_PROCESS:
        yield ((job, make_shard(job)) for job in todo)
        return
    with worker_pool(workers) as pool:
        futures = {pool.submit(make_shard, job): job for job in todo}
        yield ((futures[future], future.result()) for future in concurrent.futures.as_completed(futures))


def summary_file(job: Job) -> Path:
    """The file of the summary, which exists once the shard is complete."""
    return job.folder / f"{job.shard:05}.json"


def read_summary(job: Job) -> Summary | None:
    """The summary of a shard that is complete."""
    try:
        return parse_json(summary_file(job).read_bytes())
    except (FileNotFoundError, ValueError):  # ValueError: the power failed before the disk had it.
        return None


def _num_bytes(job: Job) -> int:
    return sum(part.num_bytes for part in job.parts)


def _described(parts: Sequence[Part]) -> list[Any]:
    return [list(part) for part in parts]
