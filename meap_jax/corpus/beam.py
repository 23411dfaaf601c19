"""Tokenizes on a cluster: `meap_jax.corpus.prepare` with the workers of Apache Beam in place of this machine's cores.

    python -m meap_jax.corpus.beam --config=configs/meap_1b.py --config.data.path=gs://bucket/c4
        --config.data.prepared=/mnt/bucket/frozen --worker_folder=gs://bucket/frozen --runner=DataflowRunner
        --project=... --region=... --temp_location=gs://bucket/tmp --setup_file=$PWD/pyproject.toml

An element of the pipeline is a shard, made as on one machine, so that the folder is the same in the end, byte for byte.
Beam may repeat an element, or have it made twice at once. This process joins the shards and packs. Interrupted, it
cancels the pipeline; started again, it has the shards made that are missing. Needs requirements-beam.txt.

Options are those of `prepare`, written with =, and Beam's. Besides:

- `--worker_folder`: what workers call the folder that is data.prepared here. By default they see it under the same
  name, on a disk that all share. A path is that disk's name on workers. The URL of a bucket, which must be mounted
  here, is for workers without a shared disk: each makes a shard in a temporary folder, and copies it there. (Folders
  are renamed: a bucket without hierarchical namespace needs gcsfuse --rename-dir-limit above the number of its files.)

Workers read the source themselves: its path must mean the same to them, so gs:// for Dataflow. (TFDS and `prepared:`
sources are read from disks alone, and so need one that is shared.) They need this package, on this Python version:

- Dataflow: `pip install "apache-beam[gcp]" gcsfs build "setuptools>=77"` here, and --setup_file with the absolute
  path of our pyproject.toml: Beam builds the package, and each worker installs it with requirements.txt, in minutes.
  Workers that read gs:// need gcsfs as well: --requirements_file with a file that names it. A large pool starts faster
  from an image made from apache/beam_python3.12_sdk, with requirements.txt, gcsfs and the package in it:
  --sdk_container_image. With --number_of_worker_harness_threads=1 a core makes one shard at a time.
- Flink: the like. See "Managing Python Pipeline Dependencies" in Beam's documentation.
- DirectRunner, the default, is this process; --direct_running_mode=multi_processing --direct_num_workers=0 takes all
  cores, though `prepare` does that better.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from meap_jax.corpus import prepare
from meap_jax.corpus.shards import Job, Summary, make_shard, read_summary, summary_file
from meap_jax.data.manifest import MANIFEST
from meap_jax.errors import ConfigError, DataError, UserError
from meap_jax.paths import is_url
from meap_jax.readers import Part

_LOOK_AFTER = 10_000  # milliseconds between looks at what is done


@contextlib.contextmanager
def run_on_beam(
    todo: Sequence[Job], options: Any, worker_folder: str | None
) -> Iterator[Iterator[tuple[Job, Summary]]]:
    """A `shards.ShardMaker`: a pipeline makes the shards; it is cancelled where the context is left before its end.

    Args:
      todo: the shards.
      options: `PipelineOptions`.
      worker_folder: see the module.

    Raises:
      ConfigError: `worker_folder` can't be opened, or is not the folder.
      DataError: the pipeline ended before all shards were there; with the error of the first that is missing.
    """
    if not todo:
        yield iter(())
        return
    import apache_beam as beam
    from apache_beam.runners.runner import PipelineState

    common = todo[0]._replace(parts=())
    if worker_folder is not None and is_url(worker_folder):
        _check_is_same(worker_folder, common.folder)
    for job in todo:
        _error_file(job).unlink(missing_ok=True)
    # Bytes, so that Beam needs to understand nothing of them; small, since Dataflow takes pipelines of 10 MB at most.
    elements = [zlib.compress(json.dumps([job.shard, job.parts]).encode()) for job in todo]
    pipeline = beam.Pipeline(options=options)
    shards = pipeline | "Shards" >> beam.Create(elements) | "Spread" >> beam.Reshuffle()
    shards | "Tokenize" >> beam.Map(functools.partial(_make_element, common, worker_folder))
    with _in_a_sentence(todo):
        result = pipeline.run()
    try:
        yield _as_done(todo, result)
    finally:
        if not PipelineState.is_terminal(result.state):
            result.cancel()


def _as_done(todo: Sequence[Job], result: Any) -> Iterator[tuple[Job, Summary]]:
    """(job, summary) as the summaries turn up in the folder."""
    from apache_beam.runners.runner import PipelineState

    left = {summary_file(job).name: job for job in todo}
    while left:
        with _in_a_sentence(todo):
            result.wait_until_finish(duration=_LOOK_AFTER)
        is_over = PipelineState.is_terminal(result.state)
        for name in sorted(left.keys() & os.listdir(todo[0].folder)):
            job = left.pop(name)
            summary = read_summary(job)
            assert summary is not None
            _error_file(job).unlink(missing_ok=True)  # Of an attempt that Beam repeated.
            yield job, summary
        if is_over and left:
            raise DataError(
                f"the pipeline is {result.state}, but {len(left)} of {len(todo)} shards are not in {todo[0].folder}: "
                "start again for the rest; if none has come, --worker_folder is not the same folder."
            )


@contextlib.contextmanager
def _in_a_sentence(todo: Sequence[Job]) -> Iterator[None]:
    """Turns a pipeline's failure into the sentence of the first shard that failed, if a worker left one."""
    try:
        yield
    except Exception as error:  # Each runner has its own.
        for job in todo:
            if _error_file(job).exists() and not summary_file(job).exists():
                raise DataError(_error_file(job).read_text(encoding="utf-8")) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the pipeline failed: {lines[-1]}") from error


def _error_file(job: Job) -> Path:
    return summary_file(job).with_suffix(".error")


def _check_is_same(url: str, folder: Path) -> None:
    """That `url` is the parent of `folder` by another name, before machines are rented for nothing."""
    manifest = f"{url.rstrip('/')}/{folder.name}/{MANIFEST}"
    try:
        with fsspec.open(manifest, "rb") as file:
            is_same = file.read() == (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        is_same = False
    except Exception as error:  # Each kind of bucket has its own, and a package may be missing.
        raise ConfigError(f"--worker_folder is {url}, but can't be read: {' '.join(str(error).split())}") from error
    if not is_same:
        raise ConfigError(
            f"--worker_folder is {url}, but must be the folder that is data.prepared ({folder.parent}) here: "
            f"{manifest} is not the one that is here."
        )


# ------------------------------------------------------------------------------------------------------- on the workers


def _make_element(common: Job, worker_folder: str | None, element: bytes) -> None:
    """Makes one shard, unless it is there, and counts."""
    from apache_beam.metrics import Metrics

    # Beam gives each core work of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shard, parts = json.loads(zlib.decompress(element))
    job = common._replace(shard=shard, parts=tuple(Part(*part) for part in parts))
    if worker_folder is not None and is_url(worker_folder):
        summary = _make_in_bucket(job, worker_folder.rstrip("/"))
    else:
        if worker_folder is not None:
            job = job._replace(folder=Path(worker_folder, job.folder.name), tokenizer=Path(worker_folder))
        summary = _make_on_disk(job)
    for name in ("documents", "tokens"):
        Metrics.counter("meap_jax", name).inc(summary[name])
    Metrics.counter("meap_jax", "skipped").inc(sum(summary["skipped"].values()))


def _make_on_disk(job: Job) -> Summary:
    try:
        return read_summary(job) or make_shard(job)
    except (UserError, OSError) as error:
        with contextlib.suppress(OSError):  # The disk may be full.
            _error_file(job).write_text(str(error), encoding="utf-8")
        raise


def _make_in_bucket(job: Job, url: str) -> Summary:
    bucket, root = fsspec.core.url_to_fs(f"{url}/{job.folder.name}")
    path = f"{root}/{summary_file(job).name}"
    if bucket.exists(path):
        return json.loads(bucket.cat_file(path))
    with tempfile.TemporaryDirectory() as scratch:
        here = job._replace(folder=Path(scratch), tokenizer=Path(_fetch_tokenizer(url).name))
        try:
            summary = make_shard(here)
        except (UserError, OSError) as error:
            bucket.pipe_file(f"{root}/{_error_file(job).name}", str(error).encode())
            raise
        # The summary last: where it is, the rest is complete.
        for name in sorted(os.listdir(scratch), key=lambda name: name == summary_file(job).name):
            bucket.put_file(f"{scratch}/{name}", f"{root}/{name}")
    return summary


@functools.lru_cache(maxsize=1)
def _fetch_tokenizer(url: str) -> tempfile.TemporaryDirectory:
    """The tokenizer's files, for as long as the worker lives."""
    bucket, root = fsspec.core.url_to_fs(url)
    folder = tempfile.TemporaryDirectory()
    for name in json.loads(bucket.cat_file(f"{root}/{MANIFEST}"))["files"]:
        bucket.get_file(f"{root}/{name}", f"{folder.name}/{name}")
    return folder


# ------------------------------------------------------------------------------------------------------------- command


def command(argv: list[str]) -> None:
    """Prepares the data of a config with the workers of a Beam runner, and prints a line of JSON a source."""
    config_words, worker_folder, beam_words = _divide(argv[1:])
    options = beam_options(beam_words)
    # Where shards are made in this process, Beam would log with a traceback what ends in one sentence.
    logging.getLogger("apache_beam.runners.common").addFilter(
        lambda record: not isinstance(record.msg, UserError | OSError)
    )
    shard_maker = functools.partial(run_on_beam, options=options, worker_folder=worker_folder)
    prepare.command([argv[0], *config_words], shard_maker)


def _divide(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Command line -> (what `cli.parse_config` takes, worker_folder, what Beam takes)."""
    folders = [word.partition("=")[2] for word in words if word.partition("=")[0] == "--worker_folder"]
    if "" in folders:
        raise ConfigError("--worker_folder is not set: write --worker_folder=gs://bucket/frozen.")
    ours = [word for word in words if word.startswith(("--config", "--noconfig", "--workdir="))]
    beams = [word for word in words if word not in ours and not word.startswith("--worker_folder=")]
    return ours, folders[-1] if folders else None, beams


def beam_options(words: Sequence[str]) -> Any:
    """`PipelineOptions` of Beam's own flags.

    Raises:
      ConfigError: a flag that Beam has not, a bad value, or no Beam.
    """
    logging.disable(logging.WARNING)  # Its import warns of every cloud that it can't reach.
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions, TypeOptions
    except ImportError as error:
        raise ConfigError(
            f"meap_jax.corpus.beam needs Apache Beam ({error}): pip install -r requirements-beam.txt"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    complaint = io.StringIO()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for group in PipelineOptions.__subclasses__():
        group._add_argparse_args(parser)
    try:
        with contextlib.redirect_stderr(complaint):
            unknown = parser.parse_known_args(words)[1]
    except SystemExit as error:  # What argparse does with a bad value, behind a page about all options.
        raise ConfigError(f"Beam's options: {complaint.getvalue().strip().splitlines()[-1]}") from error
    if unknown:
        raise ConfigError(
            f"{unknown[0]!r} is neither a flag of ours nor of Beam's: settings are given as --name=value."
        )
    options = PipelineOptions(list(words))
    # DirectRunner would first download a runner in Go. There are no triggers here, safe or not; this option makes it
    # run in Python at once.
    options.view_as(TypeOptions).allow_unsafe_triggers = True
    try:
        beam.Pipeline(options=options)
    except (ImportError, ValueError) as error:  # What the runner needs: a package, a project, a region.
        raise ConfigError(f"Beam's options: {' '.join(str(error).split())}") from error
    return options


if __name__ == "__main__":
    from meap_jax import cli
    from meap_jax.corpus import beam  # Under its name, by which workers find it.

    cli.run_command(beam.command)
