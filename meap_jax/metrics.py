"""Writes the metrics of a run to metrics.jsonl, TensorBoard and the terminal."""

import hashlib
import json
import logging
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import tqdm
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from meap_jax.model.config import ModelConfig
from meap_jax.paths import is_url, write_whole

_log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PROFILE_FOLDER = "profile"


def model_flops(model: ModelConfig, seq_len: int, num_tokens: int, *, causal: bool = True) -> int:
    """Floating-point operations of the forward and backward pass over `num_tokens` tokens, as MFU counts them.

    6 N + 6 L H d T a token, in the notation of PaLM's appendix B (arxiv.org/abs/2204.02311):

    - N: parameters that multiply, which are all weight matrices with the head, but neither the embedding table (a
      lookup) nor norms. 2 N operations forward, twice that backward.
    - Attention, scores and weighted sum: 12 L H d T counted in full, half of it counted causal, for a query sees half
      of the keys on average. Causal is the figure that we quote. Boundaries of packed documents are not taken off.
    - Never counted: recomputation (remat, flash attention, a chunked loss); softmax, norms, RoPE, the
      optimizer.

    Others count otherwise, so that the same speed has another figure. Of the 1,176M model at T = 4,096, over ours:

    | who, in which function                                | N                            | attention | ratio |
    | ----------------------------------------------------- | ---------------------------- | --------- | ----- |
    | here; maxtext, calculate_tflops_training_per_device   | matrices and head            | causal    | 1     |
    | torchtitan, get_nparams_and_flops                     | all but the embedding        | full      | 1.15  |
    | nanochat, estimate_flops                              | all but the embedding        | full      | 1.15  |
    | PaLM, appendix B; nanoGPT, estimate_mfu               | all, head and embedding tied | full      | 1.15  |
    | llm.c, gpt2_estimate_mfu                              | all, head and embedding tied | causal    | 1     |

    "All" parameters of a model that has, as ours, a head of its own would add 0.05 for the embedding.

    Args:
      model: the decoder's shape.
      seq_len: T, tokens a row.
      num_tokens: of all rows; of a step, global_batch_size * seq_len, and twice as many where each row has a masked
        copy (`Objective.num_passes`).
      causal: False counts attention in full, to compare with those who do.
    """
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = 2 * model.embed_dim * heads + 3 * model.embed_dim * model.mlp_dim  # q, o and k, v; gate, up, down.
    matrices = model.num_layers * layer + model.embed_dim * model.vocab_size
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return num_tokens * (6 * matrices + (attention // 2 if causal else attention))


class StepWork(NamedTuple):
    """The work of one step, over all devices."""

    tokens: int  # Of data: masked copies are not counted.
    flops: int  # `model_flops` of them.
    num_devices: int
    peak_flops: float | None  # Of one device in bfloat16, FLOP/s; None: not known.

    def rates(self, seconds: float) -> dict[str, float]:
        """The speed of a step that takes so many seconds.

        Returns:
          tokens_per_second, tokens_per_second_per_device; model_flops_per_second, of one device; and mfu, model FLOPs
          utilization, the share of the device's bfloat16 peak that this is, whatever the model's own dtype.
        """
        tokens, flops = self.tokens / seconds, self.flops / seconds / self.num_devices
        rates = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / self.num_devices,
            "model_flops_per_second": flops,
        }
        return rates if self.peak_flops is None else {**rates, "mfu": flops / self.peak_flops}


class MetricsWriter:
    """Writes one JSON object a logged step, TensorBoard scalars, and a progress bar (or plain lines off a terminal).

    Buckets cannot append: for a workdir such as gs://..., files are written to a local folder and uploaded by `flush`.
    """

    def __init__(self, workdir: epath.Path, *, start: int, num_steps: int, work: StepWork):
        """Goes on after step `start`: what an interrupted run wrote about later steps is cut off."""
        self._workdir = workdir
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
        self._local = local_folder(workdir)
        self._local.mkdir(parents=True, exist_ok=True)
        self._num_steps, self._work = num_steps, work
        if is_url(self._workdir) and (workdir / METRICS_FILE).exists():
            (self._local / METRICS_FILE).write_bytes((workdir / METRICS_FILE).read_bytes())
        cut_back(self._local / METRICS_FILE, start)
        self._file = (self._local / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(self._local / TENSORBOARD_FOLDER)
        self._tensorboard.forget_after(start)
        self._speed = "? tokens/s"
        self._first_write: tuple[int, float] | None = None
        self._bar = tqdm.tqdm(
            total=num_steps, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of step `step`, and the speed that `step_seconds` among them comes to."""
        now = time.perf_counter()
        self._first_write = self._first_write or (step, now)
        if "step_seconds" in values:
            values = {**values, **self._work.rates(values["step_seconds"])}
            mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
            self._speed = f"{values['tokens_per_second']:.0f} tokens/s{mfu}"
        self._file.write(as_json({"step": step, **values}) + "\n")
        self._file.flush()
        self._tensorboard.write(step, values)
        if self._bar.disable:
            extra = "".join(f"  {name} {value:.4f}" for name, value in values.items() if "/" in name)
            _log.info(
                "step %d/%d  loss %.4f  %s  %s left%s",
                step, self._num_steps, values["loss"], self._speed, self._time_left(step, now), extra,
            )  # fmt: skip

    def _time_left(self, step: int, now: float) -> str:
        """From the mean pace since the first record: compilation is over then, evaluations and saves are counted."""
        first_step, first_time = self._first_write or (step, now)
        if step == first_step:
            return "?"
        return tqdm.tqdm.format_interval((now - first_time) / (step - first_step) * (self._num_steps - step))

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar."""
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {self._speed}", refresh=False)
        self._bar.update(step - self._bar.n)

    def rewind(self, step: int) -> None:
        """Goes back to the end of a step: what was written about later ones is cut off."""
        self._file.close()
        cut_back(self._local / METRICS_FILE, step)
        self._file = (self._local / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard.forget_after(step)
        self._bar.n = step

    def flush(self) -> None:
        """Puts everything on disk (and in the bucket), so that no checkpoint is ahead of the log."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()
        if is_url(self._workdir):
            self._upload()

    def _upload(self) -> None:
        """Puts what changed since the last time into the bucket."""
        # These and no others: prepared data may be in the same local folder.
        folders = (self._local / name for name in (TENSORBOARD_FOLDER, PROFILE_FOLDER))
        files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
        for file in (self._local / METRICS_FILE, *files):
            stat = file.stat()
            if self._uploaded.get(file) == (stat.st_mtime_ns, stat.st_size):
                continue
            target = self._workdir / file.relative_to(self._local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
            self._uploaded[file] = (stat.st_mtime_ns, stat.st_size)

    def close(self) -> None:
        """Flushes and closes all files."""
        try:
            self.flush()
        finally:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()


class TensorBoard:
    """Writes scalars into an event file, in the thread that asks for it.

    tensorboardX's own writer does so in another one, which ends at the first error, such as a full disk. Whoever writes
    then waits for it for ever as soon as its queue is full.
    """

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        # Of each start a file of its own. Names begin with the second, and readers take files in the order of names.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}.{os.getpid()}")

    def forget_after(self, step: int) -> None:
        """Tells readers to drop what earlier files say of later steps."""
        started = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=started))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Puts everything on disk."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._events.close()


class NoWriter:
    """A writer that does nothing, for processes other than the first."""

    def write(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    progress = rewind = flush = close = write


def local_folder(workdir: epath.Path) -> pathlib.Path:
    """Where files that grow by appending are written: the workdir itself, or a local folder in place of a bucket."""
    if not is_url(workdir):
        return pathlib.Path(workdir)
    name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir()) / f"meap_jax-{os.getuid()}" / name


def as_json(record: Mapping[str, float]) -> str:
    """A record as one line of JSON, which knows neither NaN nor infinity: they become null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()})


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """All records of a run, in order."""
    return [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]


def cut_back(file: pathlib.Path, step: int) -> None:
    """Drops records after `step` and a last line that a kill cut short: no step is in the file twice.

    Lines that are no records, as a faulty disk leaves them, are left out with a warning; all others stay, and the file
    as it was is kept beside it.
    """
    if not file.exists():
        return
    # Lines are written whole and in order: only the last can be torn, and lacks its end.
    *lines, _ = file.read_bytes().split(b"\n")
    records: dict[int, bytes] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        of_step = _step_of(line)
        if of_step is None or of_step in records:
            damaged.append(number)
        elif of_step <= step:
            records[of_step] = line
    if damaged:
        copy = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        copy.write_bytes(file.read_bytes())
        _log.warning(
            "%s has %d lines that are no record of a step (the first is line %d): they are left out, and the file as "
            "it was is %s", file, len(damaged), damaged[0], copy.name,
        )  # fmt: skip
    write_whole(file, b"".join(line + b"\n" for _, line in sorted(records.items())))


def _step_of(line: bytes) -> int | None:
    """The step of which a line is the record; None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
