"""The order of blocks: one global sequence, whatever the mesh and the number of processes."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tiny_data
from meap_jax import sharding
from meap_jax.corpus.prepare import prepare
from meap_jax.data import pipeline
from meap_jax.data.pipeline import TrainBatches, global_sequence

RETRIEVAL = dict(
    min_facts=1, num_facts=3, num_eval_facts=3, questions_per_fact=1.0, max_fillers=1, num_documents=60,
    num_eval_documents=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    book = tmp_path_factory.mktemp("text") / "book.txt"
    book.write_text(" ".join(f"Chapter {i} tells of the number {i * i}." for i in range(400)))
    fields = dict(mixture="text=1,retrieval=3", tokenizer="bpe", vocab_size=512, seq_len=80)
    spec = tiny_data.text_spec(book, **fields, **RETRIEVAL)
    return prepare(tmp_path_factory.mktemp("prepared") / "data", spec)


WEIGHTS = {"retrieval": 3.0, "text": 1.0}


def batches(prepared, seed=0, batch_size=8, num_devices=1, axis="data"):
    mesh = sharding.make_mesh(
        {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | {axis: num_devices}, jax.devices()[:num_devices]
    )
    return TrainBatches(prepared, WEIGHTS, seed=seed, batch_size=batch_size, sharding=sharding.batch_sharding(mesh))


def take(iterator, num):
    return [jax.device_get(next(iterator)) for _ in range(num)]


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_order_depends_on_the_seed_alone(prepared):
    assert same(take(batches(prepared), 6), take(batches(prepared), 6))
    assert not same(take(batches(prepared), 6), take(batches(prepared, seed=1), 6))


@pytest.mark.parametrize(("num_devices", "axis"), [(2, "data"), (8, "data"), (4, "fsdp"), (4, "tensor")])
def test_every_mesh_sees_the_same_global_batches(prepared, num_devices, axis):
    assert same(take(batches(prepared), 3), take(batches(prepared, num_devices=num_devices, axis=axis), 3))


def test_row_r_of_step_s_is_item_s_times_b_plus_r_so_the_batch_size_only_cuts_the_sequence(prepared):
    eights = np.concatenate([b.tokens for b in take(batches(prepared, batch_size=8), 3)])
    fours = np.concatenate([b.tokens for b in take(batches(prepared, batch_size=4), 6)])
    np.testing.assert_array_equal(eights, fours)
    sequence = global_sequence(prepared, WEIGHTS, 0)
    np.testing.assert_array_equal(eights, np.stack([sequence[i].tokens for i in range(24)]))


def test_a_process_reads_only_the_rows_of_its_own_devices(prepared, monkeypatch):
    # What process 1 of 2 would own: the second half of the rows, and with `tensor` over hosts all of them.
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:2])
    whole = sharding.batch_sharding(mesh)
    half = type("Half", (), {"addressable_devices_indices_map": lambda self, shape: {
        d: i for d, i in whole.devices_indices_map(shape).items() if d.id == 1
    }})()  # fmt: skip
    np.testing.assert_array_equal(pipeline._own_rows(half, (8, 81)), [4, 5, 6, 7])
    replicated = NamedSharding(mesh, PartitionSpec())
    np.testing.assert_array_equal(pipeline._own_rows(replicated, (8, 81)), range(8))


def test_an_epoch_gives_every_block_once_and_the_next_one_another_order(prepared):
    source = {"retrieval": 1.0}
    blocks = prepared.blocks("retrieval", "train")
    num_blocks = len(blocks)
    sequence = global_sequence(prepared, source, 0)
    epochs = [[sequence[e * num_blocks + i].tokens.tobytes() for i in range(num_blocks)] for e in range(2)]
    frozen = sorted(blocks[i].tokens.tobytes() for i in range(num_blocks))
    assert sorted(epochs[0]) == sorted(epochs[1]) == frozen
    assert epochs[0] != epochs[1]


def test_sources_are_mixed_by_weight(prepared):
    sequence = global_sequence(prepared, WEIGHTS, 0)
    blocks = prepared.blocks("text", "train")
    text = {blocks[i].tokens.tobytes() for i in range(len(blocks))}
    share = np.mean([sequence[i].tokens.tobytes() in text for i in range(400)])
    assert share == pytest.approx(0.25, abs=0.01)


def test_sources_of_equal_size_come_in_different_orders():
    class Blocks(list):
        is_one_segment = True

    equal = Blocks({"tokens": np.full(4, i)} for i in range(50))
    sequence = global_sequence(SimpleNamespace(blocks=lambda source, split: equal), {"a": 1.0, "b": 1.0}, seed=0)
    drawn = [int(sequence[i]["tokens"][0]) for i in range(100)]
    first, second = drawn[::2], drawn[1::2]  # By turns.
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_a_restored_iterator_gives_the_next_batch_bit_for_bit(prepared):
    going = batches(prepared)
    take(going, 5)
    state = going.get_state()
    expected = take(going, 4)
    again = batches(prepared, num_devices=2)  # The state is the step: it holds on any mesh.
    again.set_state(state)
    assert same(take(again, 4), expected)


@pytest.mark.parametrize("packing", ["concat", "concat_segments", "best_fit"])
def test_every_packing_resumes_bit_for_bit_and_says_what_it_promises(packing, tmp_path):
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * (i % 40 + 1) for i in range(120)])
    prepared = prepare(tmp_path / "data", tiny_data.text_spec(path, packing=packing, seq_len=40))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:2])
    lies = sharding.batch_sharding(mesh)

    def batches():
        return TrainBatches(prepared, {"text": 1.0}, seed=5, batch_size=4, sharding=lies)

    going = batches()
    seen = take(going, 3)
    state = json.loads(json.dumps(going.get_state()))  # As a checkpoint keeps it.
    expected = take(going, 3)
    again = batches()
    again.set_state(state)
    assert same(take(again, 3), expected)

    rows = np.concatenate([batch.tokens for batch in seen + expected])
    if packing == "concat":
        assert seen[0].segment_ids is None
        return
    segments = np.concatenate([batch.segment_ids for batch in seen + expected])
    bos, pad = prepared.tokenizer.bos_id, prepared.tokenizer.pad_id
    starts = np.diff(segments, axis=1, prepend=0) > 0
    assert ((rows == bos) <= starts).all()  # Where a document begins, a segment does.
    assert (rows[segments == 0] == pad).all()
    assert (segments == 0).any() == (packing == "best_fit")
    assert segments.max() > 2


@pytest.mark.parametrize("kind", ["stdlib", "retrieval", "jsonl", "parquet", "prepared"])
def test_every_source_resumes_bit_for_bit(kind, prepared, tmp_path):
    name, path, texts = "text", tmp_path / "a.jsonl", [f"text {i} " * (i % 40 + 1) for i in range(150)]
    tiny_data.write_jsonl(path, texts)
    if kind in ("stdlib", "retrieval"):
        name = kind
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=40)
    elif kind == "prepared":
        prepare(tmp_path / "first", tiny_data.text_spec(path, seq_len=120))
        path = f"prepared:{tmp_path / 'first' / 'text'}"
    made = prepare(tmp_path / "data", tiny_data.text_spec(path, mixture=name, seq_len=120, **RETRIEVAL))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:2])
    lies = sharding.batch_sharding(mesh)
    going, again = (TrainBatches(made, {name: 1.0}, seed=5, batch_size=4, sharding=lies) for _ in range(2))
    take(going, 3)
    again.set_state(json.loads(json.dumps(going.get_state())))
    assert same(take(going, 4), take(again, 4))
