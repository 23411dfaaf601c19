"""Records of a run: one line a step, cut back on resume, uploaded to buckets."""

import dataclasses
import json
import logging
import struct

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from fsspec.registry import _registry as implementations
from tensorboardX.proto import event_pb2

from meap_jax.metrics import METRICS_FILE, MetricsWriter, StepWork, cut_back, local_folder, model_flops, read_metrics
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal

# A hundred tokens on four devices that could each do 1,000 operations a second.
WORK = StepWork(tokens=100, flops=8_000, num_devices=4, peak_flops=1_000.0)


def writer(workdir, start=0):
    return MetricsWriter(epath.Path(workdir), start=start, num_steps=10, work=WORK)


def write(workdir, records, start=0):
    """Writes {step: values} and closes; returns the records of the log."""
    w = writer(workdir, start)
    for step, values in records.items():
        w.write(step, values)
    w.close()
    return read_metrics(epath.Path(workdir))


def test_a_record_has_step_loss_rate_and_throughput_and_mfu_where_the_chip_is_known(tmp_path):
    [record] = write(tmp_path, {5: {"loss": 2.5, "learning_rate": 0.1, "step_seconds": 4.0, "goodput": 0.75}})
    assert record == {
        "step": 5, "loss": 2.5, "learning_rate": 0.1, "step_seconds": 4.0, "goodput": 0.75,
        "tokens_per_second": 25.0, "tokens_per_second_per_device": 6.25, "model_flops_per_second": 500.0, "mfu": 0.5,
    }  # fmt: skip
    assert WORK.rates(4.0).keys() - WORK._replace(peak_flops=None).rates(4.0).keys() == {"mfu"}


def read_scalars(folder):
    """{tag: [(step, value)]}, from records of the TFRecord format: 12 bytes before each event and 4 after it."""
    scalars = {}
    for file in sorted(folder.glob("*tfevents*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write(tmp_path, {1: {"loss": 2.5}, 2: {"loss": 2.0, "validation/accuracy": 0.5}})
    scalars = read_scalars(tmp_path / "tensorboard")
    assert scalars["loss"] == [(1, 2.5), (2, 2.0)]
    assert scalars["validation/accuracy"] == [(2, 0.5)]


def test_plain_lines_take_the_place_of_the_bar_where_there_is_no_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="meap_jax"):
        write(tmp_path, {5: {"loss": 2.5, "step_seconds": 4.0, "validation/accuracy": 0.25}})
    assert "step 5/10  loss 2.5000  25 tokens/s, MFU 50.0%  ? left" in caplog.text
    assert "validation/accuracy 0.2500" in caplog.text


def test_resume_cuts_back_to_the_restored_step_so_that_no_step_is_there_twice(tmp_path):
    write(tmp_path, {step: {"loss": float(step)} for step in range(1, 8)})
    records = write(tmp_path, {5: {"loss": 55.0}}, start=4)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 55)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + '{"step": 2, "lo')
    cut_back(file, 10)
    assert file.read_text() == json.dumps({"step": 1, "loss": 1.0}) + "\n"


@pytest.fixture
def bucket(monkeypatch):
    """gs:// served from memory, through fsspec as a real bucket is."""
    memory = fsspec.filesystem("memory")
    for protocol in ("gs", "gcs"):  # What `register_implementation` sets, and here takes back: other tests want none.
        monkeypatch.setitem(implementations, protocol, type(memory))
    yield epath.Path("gs://bucket/run")
    memory.store.clear()


def test_a_bucket_gets_the_log_at_every_flush_and_gives_it_back_on_resume(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "host1"))
    (tmp_path / "host1").mkdir()
    w = writer(bucket)
    w.write(1, {"loss": 3.0})
    w.flush()
    w.write(2, {"loss": 2.0})  # After the flush, so a machine that dies now takes it along.
    assert [r["step"] for r in read_metrics(bucket)] == [1]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "host2"))
    (tmp_path / "host2").mkdir()
    records = write(bucket, {2: {"loss": 2.5}}, start=1)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 3.0), (2, 2.5)]
    assert any("tfevents" in str(file) for file in (bucket / "tensorboard").iterdir())


def test_a_bucket_gets_a_trace_with_its_folders_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    w = writer(bucket)
    trace = local_folder(bucket) / "profile" / "plugins" / "profile" / "2026" / "host.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.write_bytes(b"steps")
    w.flush()
    there = bucket / "profile" / "plugins" / "profile" / "2026" / "host.xplane.pb"
    assert there.read_bytes() == b"steps"
    there.unlink()
    w.close()
    assert not there.exists()


def test_model_flops_are_those_counted_by_hand(tiny):
    # One token: q and o 32 x 32, k and v 32 x 16, gate, up and down 32 x 48, in two layers; head 32 x 64.
    multiplying = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64
    forward = 2 * multiplying + 2 * (2 * 2 * 10 * 32)  # Two layers of scores and sums over 10 keys, 32 wide.
    assert model_flops(tiny, 10, 1, causal=False) == 3 * forward
    assert model_flops(tiny, 10, 1) == 3 * (forward - 2 * 2 * 10 * 32)
    assert model_flops(tiny, 10, 70) == 70 * model_flops(tiny, 10, 1)


@pytest.mark.parametrize(("vocab_size", "mlp_dim", "seq_len"), [(512, 384, 128), (128, 96, 512), (4096, 384, 64)])
def test_model_flops_are_what_xla_counts_in_an_unrolled_program_that_attends_to_every_key(
    tiny, vocab_size, mlp_dim, seq_len
):
    # Within 10 %: XLA counts softmax, norms and activations too, the more of them the narrower the matrices.
    c = dataclasses.replace(
        tiny, num_heads=2, num_kv_heads=1, head_dim=64, embed_dim=128, mlp_dim=mlp_dim, vocab_size=vocab_size,
        unroll=2, attention="plain",
    )  # fmt: skip
    definition = define(c)
    tokens = jnp.zeros((2, seq_len), jnp.int32)

    def loss(params):
        logits = definition.apply(params, tokens, causal(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).sum()

    counted = jax.jit(jax.value_and_grad(loss)).lower(definition.shapes()).cost_analysis()["flops"]
    np.testing.assert_allclose(counted, model_flops(c, seq_len, tokens.size, causal=False), rtol=0.1)
