"""The report on conversations before training: counts that are those of the data, and samples with their masks."""

import re

import pytest

from chat_files import alpaca, chat_flags
from meap_jax.cli import parse_config
from meap_jax.corpus.chat_report import COLOURED, PLAIN, command, report
from meap_jax.corpus.prepare import prepare
from meap_jax.data.spec import data_spec
from meap_jax.errors import ConfigError


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = alpaca(folder / "alpaca.json")
    records = path.read_text().replace("\n]\n", ",\n") + path.read_text().split("\n")[1].rstrip(",")  # One comes twice.
    path.write_text(records + ',\n{"instruction": "no answer", "output": " "}\n]\n')
    return chat_flags(folder / "run", path, data__prepared=folder / "data")


def test_it_counts_what_a_run_would_read(flags, capsys):
    command(["chat_report", *flags])
    out = capsys.readouterr().out
    counts = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if len(words) == 9}
    assert sum(int(counts[split][0]) for split in ("train", "validation", "test")) == 121
    assert re.search(r"bad records: 1\n  1 x is blank", out)
    assert "duplicates: 1 samples have the tokens of an earlier one" in out
    histogram = [int(found) for found in re.findall(r"^ +(?:up to|above) [\d,]+ +(\d+)", out, re.MULTILINE)]
    assert sum(histogram) == int(counts["train"][0])
    config, _ = parse_config(["main", *flags])
    prepared = prepare(config.data.prepared, data_spec(config))
    with_copy = prepared.plan_manifest("text")["splits"]["train"]["with_copy"]
    assert counts["train"][4] == f"{with_copy / int(counts['train'][0]):.1%}"
    assert 0 < sum(histogram[3:]) == with_copy, "the histogram's bin begins behind 50, as masks do"


def test_samples_are_shown_with_what_their_masks_hide(flags):
    config, _ = parse_config(["main", *flags])
    prepared = prepare(config.data.prepared, data_spec(config))
    plain = report(config, prepared, 2, PLAIN)
    assert plain.count("--- sample") == 2
    assert "<bos>### Instruction:\n" in plain and "<eos>" in plain
    first = plain.split("--- sample 1")[1]
    hidden = re.findall(r"\[MASK:[^]]+\]", first)
    assert hidden, "samples with masks come first"
    coloured = report(config, prepared, 2, COLOURED)
    # The same text: colours take the place of the words that say what is masked.
    without = re.sub(r"\033\[7;31m(.*?)\033\[0m", r"[MASK:\1]", coloured, flags=re.DOTALL)
    assert re.sub(r"\033\[[\d;]*m", "", without) == plain


def test_a_config_without_conversations_is_refused(tmp_path, capsys):
    words = [f"--workdir={tmp_path}", "--config=configs/quickstart.py", "--config.data.retrieval.num_documents=50"]
    words += ["--config.data.retrieval.num_eval_documents=5"]
    with pytest.raises(ConfigError, match="data.mixture is 'retrieval=1', which names no source of the format chat"):
        command(["chat_report", *words])


def test_masks_are_shown_where_training_begins_without_them(flags):
    config, _ = parse_config(["main", *flags, "--config.objective.ramp_from=0.0"])
    assert "[MASK:" in report(config, prepare(config.data.prepared, data_spec(config)), 1, PLAIN)
