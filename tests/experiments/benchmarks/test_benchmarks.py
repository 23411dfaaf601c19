"""Every benchmark with --quick: the table that it prints, and figures that can be true."""

import importlib
import importlib.util
import json
import math
import sys

import jax
import numpy as np
import pytest

from experiments.benchmarks import harness, train_step
from experiments.benchmarks.timing import Ratio
from experiments.benchmarks.worker import OutOfMemory, Worker, WorkerError
from experiments.benchmarks.workload import config_of
from meap_jax.errors import ConfigError

# Columns that every row has, of each table in turn; a star marks a ratio, which must be finite and positive.
TABLES = {
    "masking": [{"decoder", "T", "B", "*MEAP / NTP"}, {"strategy", "*share of a step (tiny, T = 32)"}],
    "population": [{"models", "*side by side / one after the other", "*unrolled / scanned", "a step of a model, ms"}],
    "scaling": [{name, "*time, relative", "time p", "temp MiB", "temp p"} for name in ("T", "B", "layers")],
    "data": [{"train step", "*pipeline / train step, tokens/s"}, {"run", "T", "waiting", "step, ms"}],
    "startup": [{"run", "*warm / cold", "*imports / warm"},
                {"decoder", "*the call, in steps", "*steps after it / steps"}],
    "loss": [{"dtype", "B", "chunk", "plain, temp MiB", "chunked / plain"}, {"chunk", "*chunked / plain"}],
    "corpus": [{"text", "ours, tokens/s", "ours, MB/s"}, {"datasets with", "ours, tokens/s"}, {"after", "resident MB"}],
    "generation": [{"decoder", "parameters", "T", "prefill, tokens/s", "decode, tokens/s"},
                   {"decoder", "MB", "import, s/GB", "*import / load_file, time", "*export / save_file, time"}],
    "fine_tuning": [{"samples", "rows, none", "*shared_prefix / separate, time of an epoch"}],
    "needles": [{"decoder", "T", "*shared / one by one, time", "texts that agree", "shared, s"}],
    "soak": [{"steps", "allocated, MB", "open files", "threads", "step p50, ms"}, {"allocated, MB a 1,000 steps"}],
    "train_step": [{"decoder", "parameters", "T", "B", "*ours, unrolled / scanned", "*ours, share of the matmul peak"}],
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("masking", []), ("scaling", []), ("data", []), ("loss", []), ("startup", ["--repeats=1"]),
        ("population", ["--repeats=1"]),
        ("needles", ["--repeats=1"]), ("soak", ["--repeats=1"]), ("fine_tuning", ["--repeats=1"]),
        ("corpus", ["--repeats=1", "--no-datasets"]), ("train_step", ["--repeats=1", "--no-torch"]),
        ("generation", ["--repeats=1", "--no-torch"]),
    ],
)  # fmt: skip
def test_quick_run_prints_its_tables(name, flags, tmp_path, capsys):
    file = tmp_path / "result.json"
    importlib.import_module(f"experiments.benchmarks.{name}").command([name, "--quick", f"--json={file}", *flags])
    result, out = json.loads(file.read_text()), capsys.readouterr().out
    assert result["benchmark"] == name and result["setting"]["jax"]
    for table, columns in zip(result["tables"], TABLES[name], strict=True):
        assert f"**{table['title']}**" in out
        for row in table["rows"]:
            assert {column.strip("*") for column in columns} <= set(row)
            for ratio in (row[column[1:]] for column in columns if column.startswith("*")):
                assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] < math.inf, row
    assert result["repeats"] == (1 if flags else 2)
    first, *_ = rows = result["tables"][0]["rows"]
    if name == "data":
        assert all(0 <= row["waiting"]["median"] < 1 for row in result["tables"][1]["rows"])
    if name == "loss":
        # Half the positions at a time: half the logits, whatever the compiler does with the rest.
        assert all(row["chunked / plain"] < 1 for row in rows)
    if name == "needles":
        assert first["texts that agree"] == 1
    if name == "soak":
        sizes = [row["allocated, MB"] for row in rows]
        assert len(rows) >= 3 and 100 < min(sizes) <= max(sizes) < 4_000
        assert result["tables"][1]["rows"][0]["events, bytes a record"] > 0
    if name == "corpus":
        assert first["ours / datasets, tokens/s"] is None
    if name == "train_step":
        assert not any("torch" in column for column in first)


def test_without_torch_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install -r requirements-parity.txt, or give --no-torch"):
        train_step.command(["train_step"])


def test_batches_double_on_an_accelerator_until_memory_ends(monkeypatch):
    """The search for the largest batch, and for torch's from there, with engines that only pretend to run."""
    room = {"ours": 8, "eager": 2, "compiled": 4}
    about = {
        "engine": "e", "device": "1 x GPU", "num_devices": 1, "peak_flops": 1e9, "parameters": 10, "temp_bytes": 2**30
    }  # fmt: skip

    def alone(name, config, repeats):
        if config.global_batch_size > room[name]:
            raise OutOfMemory("RESOURCE_EXHAUSTED")
        num_tokens = config.global_batch_size * config.seq_len
        seconds = np.full(repeats, num_tokens / 1e6)
        return about | {"flops": 100 * num_tokens, "num_tokens": num_tokens}, seconds

    monkeypatch.setattr(train_step, "_alone", alone)
    monkeypatch.setattr(train_step, "_torch_sees", lambda device: device == "1 x GPU")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    table = train_step.on_accelerator(config_of("tiny", seq_len=32, batch_size=1), 1, list(room), repeats=3)
    assert [row["B"] for row in table.rows] == [1, 2, 4, 8, 2, 4]
    assert "No room for B = 16." in table.note
    assert [row["MFU"] for row in table.rows] == [pytest.approx(Ratio(0.1, 0.1, 0.1))] * 6
    assert [row["tokens/s, fastest of ours / this"] for row in table.rows] == [pytest.approx(1)] * 6

    room["ours"] = 0
    with pytest.raises(WorkerError, match="does not fit with 1 rows"):
        train_step.on_accelerator(config_of("tiny", seq_len=32, batch_size=1), 1, ["ours"], repeats=1)


def test_engines_that_train_another_decoder_are_not_compared():
    about = {"parameters": 10, "threads": 2, "first_loss": math.log(64) + 0.1}
    train_step.check_same_work({"ours": about, "eager": about}, 64)
    for field, value in (("parameters", 11), ("threads", 1), ("first_loss", math.nan), ("first_loss", 9.0)):
        with pytest.raises(WorkerError):
            train_step.check_same_work({"ours": about, "eager": about | {field: value}}, 64)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="XLA of jax 0.12 for CPUs dies (SIGFPE) at sizes that no memory holds"
)
def test_a_decoder_that_no_memory_holds_is_reported_as_that():
    config = config_of("tiny", seq_len=32, batch_size=2, mlp_dim=2**30, embed_dim=2**14)  # 64 TiB a matrix.
    with pytest.raises(OutOfMemory):
        Worker(train_step.OURS, {"config": config.to_dict()})


def test_another_error_of_an_engine_is_reported_in_its_own_words():
    with pytest.raises(WorkerError, match="seq_len is 1"):
        Worker(train_step.OURS, {"config": config_of("tiny", seq_len=1, batch_size=2).to_dict()})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--repeats=0"], "--repeats is 0, but must be"),
        (["--repeats=x"], "invalid int value"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--json=/no/such/folder/x.json"], "--json is /no/such/folder/x.json, but must be"),
    ],
)
def test_bad_flags_are_named_before_anything_is_measured(flags, expected):
    command = harness.main("name", "", lambda args: pytest.fail("measured"), repeats=1)
    with pytest.raises(ConfigError, match=expected):
        command(["name", *flags])
    with pytest.raises(ConfigError, match="--sizes is '1M,7M', but must be some of"):
        train_step.command(["train_step", "--no-torch", "--sizes=1M,7M"])


def test_numbers_of_a_table_are_as_long_as_they_are_sure():
    row = {"a": Ratio(1.0041, 0.99, 1.02), "b": 12345.6, "c": 0.0000312, "d": None, "e": 7, "f": Ratio(2.345, 2, 3)}
    last = harness.Table("title", [row], "note").markdown().splitlines()[4]
    assert last == "| 1.004 (0.990, 1.020) | 12,346 | 0.000031 |  | 7 | 2.35 (2.00, 3.00) |"
