"""Records of a run: one line a step, cut back on resume, uploaded to buckets."""

import dataclasses
import logging
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from meap_jax.metrics import METRICS_FILE, MetricsWriter, StepWork, local_folder, model_flops, read_metrics
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


def events_of(workdir):
    """What event files say, in the order of their lines: (step, {name: value}), or (step, "forget")."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            [length] = struct.unpack("Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "forget"))
            elif event.HasField("summary"):
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found


def test_tensorboard_gets_the_same_numbers_and_forgets_what_is_written_again(tmp_path):
    write(tmp_path, {1: {"loss": 2.5}, 2: {"loss": 2.0, "validation/accuracy": 0.5}})
    assert events_of(tmp_path) == [(1, "forget"), (1, {"loss": 2.5}), (2, {"loss": 2.0, "validation/accuracy": 0.5})]
    w = writer(tmp_path, start=1)
    w.write(2, {"loss": 1.5})
    w.rewind(1)
    w.close()
    assert events_of(tmp_path)[3:] == [(2, "forget"), (2, {"loss": 1.5}), (2, "forget")]
    assert [r["step"] for r in read_metrics(epath.Path(tmp_path))] == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_null(tmp_path, value):
    [record] = write(tmp_path, {1: {"loss": value, "grad_norm": 1.0}})
    assert record == {"step": 1, "loss": None, "grad_norm": 1.0}


DAMAGES = [b"", b"\0\0\0\0", b"\xff\xfe\xfd", b"null", b"[1]", b'{"step": "x"}', b'{"loss": 2.5}', b"[" * 50_000]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_damaged_line_costs_no_other_record_and_the_file_as_it_was_stays(tmp_path, damage, place, caplog):
    good = write(tmp_path, {step: {"loss": float(step)} for step in range(1, 8)})
    file = tmp_path / METRICS_FILE
    lines = file.read_bytes().splitlines()
    damaged = b"".join(line + b"\n" for line in [*lines[:place], damage, *lines[place:]])
    file.write_bytes(damaged)
    records = write(tmp_path, {7: {"loss": 7.0}}, start=6)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[:2] == good[:2] and records[3:] == good[3:]
    [copy] = tmp_path.glob(f"{METRICS_FILE}.damaged-*")
    assert copy.read_bytes() == damaged and "1 lines that are no record of a step" in caplog.text


def test_lines_in_another_order_and_a_step_that_is_there_twice_leave_each_step_once_in_order(tmp_path):
    write(tmp_path, {step: {"loss": float(step)} for step in range(1, 6)})
    file = tmp_path / METRICS_FILE
    one, two, three, four, five = file.read_text().splitlines(keepends=True)
    file.write_text("".join([three, one, two, three, five, four]))
    assert [r["step"] for r in write(tmp_path, {6: {"loss": 6.0}}, start=5)] == [1, 2, 3, 4, 5, 6]


def test_plain_lines_stand_in_for_the_bar_where_there_is_no_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="meap_jax"):
        write(tmp_path, {5: {"loss": 2.5, "step_seconds": 4.0, "validation/accuracy": 0.25}})
    assert "step 5/10  loss 2.5000  25 tokens/s, MFU 50.0%  ? left" in caplog.text
    assert "validation/accuracy 0.2500" in caplog.text


def test_resume_drops_later_steps_and_a_line_torn_by_a_kill(tmp_path):
    write(tmp_path, {step: {"loss": float(step)} for step in range(1, 8)})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    records = write(tmp_path, {5: {"loss": 55.0}}, start=4)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 55)]


def test_a_bucket_gets_the_log_at_every_flush_and_gives_it_back_on_resume(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "host1"))
    w = writer(bucket)
    w.write(1, {"loss": 3.0})
    w.flush()
    w.write(2, {"loss": 2.0})  # After the flush, so a machine that dies now takes it along.
    assert [r["step"] for r in read_metrics(bucket)] == [1]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "host2"))
    records = write(bucket, {2: {"loss": 2.5}}, start=1)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 3.0), (2, 2.5)]
    assert any("tfevents" in str(file) for file in (bucket / "tensorboard").iterdir())


def test_a_bucket_gets_a_trace_with_its_folders_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    w = writer(bucket)
    there, trace = (folder / "profile/plugins/profile/2026/host.xplane.pb" for folder in (bucket, local_folder(bucket)))
    trace.parent.mkdir(parents=True)
    trace.write_bytes(b"steps")
    w.flush()
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
