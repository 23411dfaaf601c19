"""The commands, end to end on two tiny models: what they leave behind, and what they refuse before they begin."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from meap_jax.analysis import masked, sequences
from meap_jax.analysis.__main__ import command
from meap_jax.analysis.attention import masked_key_statistics
from meap_jax.analysis.contrasts import CELLS
from meap_jax.checkpoint import save_params
from meap_jax.errors import ConfigError, DataError
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.models import open_model, save_tokenizer, write_config
from tiny_models import numbers
from tiny_runs import tiny_config
from tokenizer_kinds import TEXTS, kind

CONTEXT, SEQ_LEN = 256, 64
MESH = "--mesh=data=4,fsdp=2"


def write_workdir(folder, objective, scale, tokenizer="bpe", **changes):
    """What a run leaves behind, without the run."""
    c = tiny_config(**{"model.vocab_size": 640, "seq_len": CONTEXT, "objective.name": objective, **changes})
    c.objective.mask_id = kind(tokenizer).mask_id
    folder = epath.Path(folder)
    folder.mkdir()
    write_config(folder, c)
    params = numbers(define(ModelConfig.of(c.model, "cpu")))
    meta = {"tokenizer": save_tokenizer(folder, kind(tokenizer))}
    save_params(folder, jax.tree.map(lambda x: scale * x, params), meta, step=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the workdirs ntp and meap, and text.jsonl."""
    folder = tmp_path_factory.mktemp("made")
    write_workdir(folder / "ntp", "ntp", 0.5)
    write_workdir(folder / "meap", "meap", 0.6)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def run(made, kind_of, *flags, out):
    """Runs a command; returns its JSON and its page."""
    models = [f"--ntp={made}/ntp", f"--meap={made}/meap", f"--text={made}/text.jsonl", f"--seq_len={SEQ_LEN}"]
    models = models if kind_of == "masked" else [f"--workdir={made}/ntp", f"--workdir={made}/meap"]
    command(["analysis", kind_of, *models, f"--out={out}", MESH, *flags])
    return json.loads((out / f"{kind_of}.json").read_text()), (out / f"{kind_of}.md").read_text()


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_masked_keys_end_to_end(made, tmp_path, capsys):
    found, page = run(made, "masked", "--num_sequences=20", "--layers=1", out=tmp_path / "out")
    assert capsys.readouterr().out.strip() == page.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert all(is_png(tmp_path / "out" / f"{name}.png") for name in ("contrasts", "layers", "heads"))
    assert set(found["cells"]) == set(CELLS) and found["setting"]["layers"] == [1]
    assert found["setting"]["gaps_a_sequence"] == int(0.15 * (SEQ_LEN - 1))
    assert found["setting"]["models"]["meap"]["step"] == 7
    assert np.shape(found["heads"]["masked_per_key"]["with"]["paper"]) == (2, 4)
    assert len(found["sequences"]["ntp_clean"]["masked_pooled"]["with"]) == 20
    row = found["contrasts"]["masked_per_key"][0]
    assert row["contrast"] == "paper" and row["relative"]["low"] < row["relative"]["estimate"] < row["relative"]["high"]
    of_layer = [row for row in found["layers"]["masked_per_key"] if row["layer"] == 1]
    assert [row["t"] for row in of_layer] == [row["t"] for row in found["contrasts"]["masked_per_key"]]
    assert f"| {-100 * row['relative']['estimate']:.2f} [" in page and "(the paper's)" in page


def test_one_model_in_both_places_differs_by_the_input_alone(made):
    folders = dict.fromkeys(("ntp", "meap"), epath.Path(made / "meap"))
    options = dict(seq_len=40, num_sequences=9, text=str(made / "text.jsonl"), mesh=dict(data=8))
    found = masked.analyse(folders, **options)
    contrasts = {row["contrast"]: row for row in found["contrasts"]["masked_pooled"] if row["first_token"] == "with"}
    for name in ("model_clean", "model_masked", "interaction"):
        assert contrasts[name]["difference"]["estimate"] == 0 and contrasts[name]["p"] == 1
    assert contrasts["input_ntp"]["t"] == contrasts["input_meap"]["t"] == contrasts["paper"]["t"] != 0
    others = masked.analyse(folders, **options | dict(seed=1))
    assert others["setting"]["tokens_sha256"] == found["setting"]["tokens_sha256"]
    assert others["contrasts"] != found["contrasts"]  # Other gaps.


def test_each_input_is_measured_with_the_same_gaps(made):
    opened = open_model(epath.Path(made / "meap"), mesh=dict(data=8))
    clean = np.random.default_rng(0).integers(4, 600, (8, 40)).astype(np.int32)
    given, gaps = sequences.draw_masks(clean, 0.15, kind("bpe").mask_id, seed=0)
    found = masked.measure(opened, clean, given, gaps)
    for name, tokens in (("clean", clean), ("masked", given)):
        with jax.set_mesh(opened.model.mesh):
            expected = masked_key_statistics(opened.params, tokens, gaps, definition=opened.model.definition)
        for quantity, values in expected.items():
            np.testing.assert_allclose(found[name][quantity], np.moveaxis(values, 1, 0), rtol=1e-4, atol=1e-7)


def test_segments_end_to_end(made, tmp_path):
    found, page = run(made, "segments", out=tmp_path / "out")
    assert is_png(tmp_path / "out" / "segments.png")
    shares = found["shares"][f"{made}/meap"]["Eiffel Tower"]
    for score in ("mean", "sum"):
        for view in ("eos", "query", "all"):
            own = shares[score]["without"][view]
            assert sum(own["all"]) == pytest.approx(1) and np.sum(own["layers"]) == pytest.approx(2)
    # Seen from one query the sums of a layer are its weights, and their mean over layers sums to 1 as it is.
    own = shares["sum"]["with"]["eos"]
    np.testing.assert_allclose(own["all"], np.mean(own["layers"], axis=0), rtol=1e-5)
    assert shares["sum"]["with"]["query"]["all"][4] == 0 < shares["sum"]["with"]["eos"]["all"][4]
    assert "| the paper's NTP, 1.1B | not stated | 0.731 | 0.108 | 0.080 |" in page and "copy error" in page
    assert f"{shares['mean']['with']['eos']['all'][1]:.3f}" in page and "## Differences" in page


def test_a_users_examples_are_used_in_place_of_ours(made, tmp_path):
    line = dict(name="own", before="a b c d.", answer=" e f g.", after=" h i.", query=" j k?", eos=" l.")
    lines = [line | dict(name=f"own {number}") for number in range(6)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found, page = run(made, "segments", f"--examples={tmp_path}/mine.jsonl", out=tmp_path / "out")
    assert [example["name"] for example in found["examples"]] == [f"own {number}" for number in range(6)]
    assert found["paper"] == {} and "the paper's NTP" not in page
    assert all(record["difference"]["estimate"] is not None for record in found["differences"])


def test_sequences_are_one_stream_behind_begins_of_documents():
    tokenizer = kind("bpe")
    texts = ["The sky is blue.", "The grass is green.", "never read"]
    rows = sequences.cut_sequences(iter(texts), tokenizer, 9, 2)
    stream = [id for text in texts[:2] for id in (*tokenizer.encode(text), tokenizer.eos_id, tokenizer.bos_id)]
    assert rows.dtype == np.int32 and (rows[:, 0] == tokenizer.bos_id).all()
    assert rows[:, 1:].ravel().tolist() == stream[:16]


def test_gaps_are_exact_and_never_the_first_or_the_last_token():
    tokens = np.arange(4, 4 + 300 * 21, dtype=np.int32).reshape(300, 21)
    found, gaps = sequences.draw_masks(tokens, 0.15, 3, seed=0)
    assert (gaps.sum(axis=1) == 3).all() and not gaps[:, [0, -1]].any() and gaps[:, 1:-1].any(axis=0).all()
    assert ((found == 3) == gaps).all() and (found[~gaps] == tokens[~gaps]).all()


def test_without_a_path_the_text_is_the_documentation_of_python(monkeypatch):
    monkeypatch.setattr(sequences, "read_stdlib", lambda: ["one", "two"])
    assert list(sequences.texts_of(None)) == ["one", "two"]


@pytest.mark.parametrize(
    "flags, error, said",
    [
        (["--seq_len=257"], ConfigError, "--seq_len is 257, but must be from 16 to the 256 of the model of --ntp"),
        (["--seq_len=8"], ConfigError, "--seq_len is 8"),
        (["--num_sequences=1"], ConfigError, "--num_sequences is 1, but must be at least 2"),
        (["--num_sequences=9999"], DataError, "give .* sequences of 64 tokens, but 9,999 are asked for"),
        (["--mask_ratio=1"], ConfigError, r"--mask_ratio is 1, but must be in \(0, 1\)"),
        (["--layers=2"], ConfigError, "--layers is '2', but must be all, or different numbers from 0 to 1"),
        (["--layers=0,0"], ConfigError, "--layers is '0,0'"),
        (["--layers=last"], ConfigError, "--layers is 'last'"),
        (["--seed=-1"], ConfigError, "--seed is -1"),
        (["--text=nowhere"], ConfigError, "--text: the path is 'nowhere', which does not exist"),
        (["--mesh=context=2,data=4"], ConfigError, "mesh.context is 2, but .* whole sequences: give --mesh=context=1"),
        (["--mesh=data=3"], ConfigError, "mesh is data=3"),
        (["--ntp=nowhere"], ConfigError, "nowhere holds no config.json"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(made, tmp_path, flags, error, said):
    with pytest.raises(error, match=said):
        run(made, "masked", "--num_sequences=4", *flags, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_go_together_are_refused(made, tmp_path):
    write_workdir(tmp_path / "deep", "meap", 0.5, **{"model.num_layers": 3})
    with pytest.raises(ConfigError, match="model.num_layers is 2 in .*ntp and 3 in .*deep, but must be the same"):
        run(made, "masked", f"--meap={tmp_path}/deep", out=tmp_path / "out")
    write_workdir(tmp_path / "other", "meap", 0.5, "sentencepiece")
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        run(made, "masked", f"--meap={tmp_path}/other", out=tmp_path / "out")


def test_a_run_of_another_objective_is_compared_with_a_warning(made, caplog):
    folders = dict.fromkeys(("ntp", "meap"), epath.Path(made / "ntp"))
    stored = {name: masked.open_stored_model(folder) for name, folder in folders.items()}
    masked.check_pair(stored, folders)
    assert f"--meap is {made}/ntp, a run of the objective ntp" in caplog.text
    assert "--ntp is" not in caplog.text


def test_a_folder_that_exists_is_left_alone(made, tmp_path):
    with pytest.raises(ConfigError, match="--out is .*, which exists"):
        run(made, "segments", out=tmp_path)


def test_the_segments_command_refuses_a_model_twice_and_a_text_that_is_too_long(made, tmp_path):
    with pytest.raises(ConfigError, match="--workdir names a folder twice"):
        run(made, "segments", f"--workdir={made}/ntp", out=tmp_path / "out")
    line = dict(name="own", before="a b c d." * 80, answer=" e f g.", after=" h i.", query=" j k?", eos=" l.")
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="the example 'own' has [0-9]+ tokens, but the model reads 256"):
        run(made, "segments", f"--examples={tmp_path}/mine.jsonl", out=tmp_path / "out")


def test_help_tells_both_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        command(["analysis", "--help"])
    assert stopped.value.code == 0
    assert "masked --ntp=DIR --meap=DIR --out=DIR" in capsys.readouterr().out
