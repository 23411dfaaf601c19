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
from meap_jax.corpus.prepare import prepare
from meap_jax.data import pipeline
from meap_jax.data.pipeline import TrainBatches, global_sequence
from meap_jax.rows import Row
from meap_jax.sharding import batch_sharding
from tiny_models import mesh_of

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


def batches(prepared, weights=WEIGHTS, seed=0, batch_size=8, **mesh):
    sharding = batch_sharding(mesh_of(**mesh))
    return TrainBatches(prepared, weights, seed=seed, batch_size=batch_size, sharding=sharding)


def take(iterator, num):
    return [jax.device_get(next(iterator)) for _ in range(num)]


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def taken_and_resumed(prepared, weights):
    """Some batches; checks that the later ones come again, on another mesh, from the state between."""
    going, again = batches(prepared, weights), batches(prepared, weights, data=2)
    seen = take(going, 3)
    again.set_state(json.loads(json.dumps(going.get_state())))  # As a checkpoint keeps it.
    expected = take(going, 3)
    assert same(take(again, 3), expected)
    return seen + expected


def test_the_order_depends_on_the_seed_alone(prepared):
    assert same(take(batches(prepared), 6), take(batches(prepared), 6))
    assert not same(take(batches(prepared), 6), take(batches(prepared, seed=1), 6))


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 8}, {"fsdp": 4}, {"tensor": 4}], ids=str)
def test_every_mesh_sees_the_same_global_batches(prepared, mesh):
    assert same(take(batches(prepared), 3), take(batches(prepared, **mesh), 3))


def test_row_r_of_step_s_is_item_s_times_b_plus_r_so_the_batch_size_only_cuts_the_sequence(prepared):
    eights = np.concatenate([b.tokens for b in take(batches(prepared, batch_size=8), 3)])
    fours = np.concatenate([b.tokens for b in take(batches(prepared, batch_size=4), 6)])
    np.testing.assert_array_equal(eights, fours)
    sequence = global_sequence(prepared, WEIGHTS, 0)
    np.testing.assert_array_equal(eights, np.stack([sequence[i].tokens for i in range(24)]))


def test_an_error_of_the_reader_reaches_who_waits_for_its_batch(prepared, monkeypatch):
    sequence = global_sequence(prepared, WEIGHTS, 0)

    class Failing:
        """A disk that gives the rows of two batches and then an error."""

        def __getitem__(self, index):
            if index >= 16:
                raise OSError(5, "Input/output error")
            return sequence[index]

    monkeypatch.setattr(pipeline, "global_sequence", lambda *arguments: Failing())
    going = batches(prepared)
    assert len(take(going, 2)) == 2
    with pytest.raises(OSError, match="Input/output error"):
        next(going)


def test_a_process_reads_only_the_rows_of_its_own_devices(prepared, monkeypatch):
    # What process 1 of 2 would own: the second half of the rows, and with `tensor` over hosts all of them.
    mesh = mesh_of(data=2)
    whole = batch_sharding(mesh)
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
    equal = [Row(np.full(4, i)) for i in range(50)]
    prepared = SimpleNamespace(blocks=lambda source, split: equal, spec=SimpleNamespace(row_fields=("tokens",)))
    sequence = global_sequence(prepared, {"a": 1.0, "b": 1.0}, seed=0)
    drawn = [int(sequence[i].tokens[0]) for i in range(100)]
    first, second = drawn[::2], drawn[1::2]  # By turns.
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("packing", ["concat", "concat_segments", "best_fit"])
def test_every_packing_resumes_bit_for_bit_and_says_what_it_promises(packing, tmp_path):
    path = tiny_data.write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * (i % 40 + 1) for i in range(120)])
    prepared = prepare(tmp_path / "data", tiny_data.text_spec(path, packing=packing, seq_len=40))
    seen = taken_and_resumed(prepared, {"text": 1.0})
    rows = np.concatenate([batch.tokens for batch in seen])
    if packing == "concat":
        assert seen[0].segment_ids is None
        return
    segments = np.concatenate([batch.segment_ids for batch in seen])
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
    taken_and_resumed(made, {name: 1.0})
