"""Models of the hub come in and go out as they are, on any mesh, and what can't come in is refused whole."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from hub_folders import NUM_IDS, content_of, read_tensors, tensors_of, write_model
from meap_jax import convert, evaluate, generate
from meap_jax.convert import import_model
from meap_jax.errors import ConfigError, DataError
from meap_jax.export import export_model
from meap_jax.hub import open_hub_model
from tiny_runs import PEAK, ROOT, environment

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip


@pytest.mark.parametrize(
    "family, changes, num_files",
    [
        ("llama", dict(rope_scaling=SCALED, rope_theta=5e5), 1),
        ("mistral", dict(head_dim=6, hidden_size=40), 3),
        ("qwen2", dict(tie_word_embeddings=True), 2),
    ],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_every_tensor_goes_out_with_the_bytes_with_which_it_came_in(tmp_path, family, changes, num_files, dtype):
    content = content_of(family, **changes)
    given = write_model(tmp_path / "hub", content, dtype=dtype, num_files=num_files)
    workdir, out = epath.Path(tmp_path / "ours"), epath.Path(tmp_path / "out")
    import_model(tmp_path / "hub", workdir, mesh=dict(fsdp=2, tensor=2, data=2))
    export_model(workdir, out, mesh=dict(data=2, fsdp=4), largest_file=40_000)
    found = read_tensors(tmp_path / "out")
    assert found.keys() == given.keys()
    for name, array in given.items():
        rows = NUM_IDS if name in TABLES else len(array)  # The last three have no token, the first of these is [MASK].
        assert found[name][:rows].tobytes() == array[:rows].tobytes(), name
    assert {found[name].shape[0] for name in TABLES if name in found} == {NUM_IDS + 1}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(given) and len(set(index["weight_map"].values())) > 2
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert convert.hf_config.read(again) == convert.hf_config.read({**content, "vocab_size": NUM_IDS + 1})


def test_every_mesh_reads_the_same_parameters_and_mask_takes_the_mean_of_the_rows(tmp_path):
    content = content_of("llama")
    given = write_model(tmp_path, content)
    opened = [
        open_hub_model(tmp_path, mesh=mesh) for mesh in ({}, dict(fsdp=1, tensor=4, data=2), dict(fsdp=4, tensor=2))
    ]
    first, *others = (jax.device_get(found.params) for found in opened)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)
    assert opened[1].params["layers"]["attn"]["q_proj"].sharding.shard_shape((3, 32, 4, 8)) == (3, 32, 1, 8)
    embedding, head = (given[name].astype(np.float32) for name in TABLES)
    real = np.r_[:NUM_IDS, NUM_IDS + 1 : len(embedding)]
    for table, rows in ((first["embedding"], embedding), (first["head"].T, head)):
        np.testing.assert_allclose(table[NUM_IDS], rows[real].mean(axis=0), atol=1e-6)
        np.testing.assert_array_equal(table[: len(rows)][real], rows[real])
    assert opened[0].model.config.objective.mask_id == opened[0].tokenizer.mask_id == NUM_IDS


def test_random_rows_are_drawn_from_the_seed(tmp_path):
    write_model(tmp_path, content_of("llama"))
    a, b, c = (open_hub_model(tmp_path, mask_init="random", seed=seed).params["embedding"] for seed in (0, 0, 1))
    assert (a == b).all() and not (a[NUM_IDS] == c[NUM_IDS]).any() and (a[:NUM_IDS] == c[:NUM_IDS]).all()
    assert 0.01 < np.asarray(a[NUM_IDS]).std() < 0.03


def test_a_token_that_the_tokenizer_reserves_becomes_mask_and_keeps_its_row(tmp_path):
    content = content_of("llama", rows=NUM_IDS + 2)
    added = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    given = write_model(tmp_path / "hub", content, added=added)
    opened = open_hub_model(tmp_path / "hub")
    assert opened.tokenizer.mask_id == NUM_IDS and opened.model.config.model.num_tokens == NUM_IDS + 2
    np.testing.assert_array_equal(opened.params["embedding"][NUM_IDS], given[TABLES[0]][NUM_IDS].astype(np.float32))
    filled = open_hub_model(tmp_path / "hub", mask_init="mean").params["embedding"]
    assert not np.array_equal(filled[NUM_IDS], opened.params["embedding"][NUM_IDS])
    import_model(tmp_path / "hub", epath.Path(tmp_path / "ours"))
    export_model(epath.Path(tmp_path / "ours"), epath.Path(tmp_path / "out"))
    names = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert names["mask_token"] == added[0]


def test_end_tokens_and_begin_tokens_of_the_hub_hold_for_generation(tmp_path):
    write_model(tmp_path, content_of("qwen2", eos_token_id=[2, 7], tie_word_embeddings=True))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    generator = generate.Generator.of(open_hub_model(tmp_path))
    assert generator._stops.tolist() == [2, 9] and generator.encode("sky")[0] == 1
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert generate.Generator.of(open_hub_model(tmp_path)).encode("sky")[0] != 1


# ------------------------------------------------------------------------------------------------------------ bad input


def spoilt(folder, case):
    """A folder that can't come in, and what the sentence about it says."""
    content = content_of("llama")
    tensors = tensors_of(content, ml_dtypes.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    num_files, said = 1, name
    if case == "missing file":
        num_files, said = 3, "lacks model-00002-of-00003.safetensors"
    elif case == "wrong shape":
        tensors[name] = tensors[name][:-1]
    elif case == "wrong dtype":
        tensors[name] = tensors[name].astype(np.int8)
    elif case == "not finite":
        tensors[name][3, 2] = np.nan
    elif case == "missing tensor":
        del tensors[name]
    elif case == "unknown tensor":
        said = "model.layers.1.self_attn.q_proj.bias"
        tensors[said] = np.zeros(32, ml_dtypes.bfloat16)
    elif case == "tokenizer too large":
        content, said = content_of("llama", rows=NUM_IDS - 1), f"tokenizer of {NUM_IDS} ids"
        tensors = tensors_of(content, ml_dtypes.bfloat16)
    write_model(folder, content, tensors, num_files=num_files)
    file = folder / "model.safetensors"
    if case == "missing file":
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif case == "pickle":
        file.rename(folder / "pytorch_model.bin")
        said = "pytorch_model.bin, a pickle"
    elif case == "no weights":
        file.unlink()
        said = "holds neither model.safetensors"
    elif case == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
        said = "can't be read as safetensors"
    elif case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        said = "holds no tokenizer"
    elif case == "no config":
        (folder / "config.json").unlink()
        said = "config.json can't be read"
    elif case == "config is no JSON":
        (folder / "config.json").write_text("{")
        said = "config.json is no JSON"
    return said


@pytest.mark.parametrize(
    "case",
    [
        "missing file", "wrong shape", "wrong dtype", "not finite", "missing tensor", "unknown tensor", "pickle",
        "cut off", "tokenizer too large", "no weights", "no tokenizer", "no config", "config is no JSON",
    ],
)  # fmt: skip
def test_what_cannot_come_in_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, case):
    said = spoilt(tmp_path / "hub", case)
    with pytest.raises((DataError, ConfigError)) as error:
        import_model(tmp_path / "hub", epath.Path(tmp_path / "ours"))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_folder_that_exists_is_never_written_over(tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(ConfigError, match="--out is .*ours, which exists"):
        import_model(tmp_path / "hub", epath.Path(tmp_path / "ours"))
    with pytest.raises(ConfigError, match="holds no config.json"):
        export_model(epath.Path(tmp_path / "ours"), epath.Path(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# ------------------------------------------------------------------------------------------------------------- commands


def test_the_commands_import_continue_and_export_a_model(tmp_path, monkeypatch, capsys):
    content = content_of("llama")
    write_model(tmp_path / "hub", content)
    convert.command(["convert", "import", f"--hf={tmp_path / 'hub'}", f"--out={tmp_path / 'ours'}", "--mesh=fsdp=8"])
    words = ["generate", f"--workdir={tmp_path / 'ours'}", "--prompt=The access code", "--max_new_tokens=20"]
    generate.command(words)
    text = capsys.readouterr().out
    generate.command([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert text == found["text"] + "\n" and len(found["tokens"]) == len(found["log_probs"]) <= 20
    with pytest.raises(ConfigError, match="holds an imported model, which has no data"):
        evaluate.evaluate(epath.Path(tmp_path / "ours"))
    convert.command(
        ["convert", "export", f"--workdir={tmp_path / 'ours'}", f"--out={tmp_path / 'out'}", "--dtype=float32"]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Imported from a `llama` model" in card and str(tmp_path) not in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == [NUM_IDS] and settings["eos_token_id"] == 2


# In a process of its own, so that what other tests left behind counts for nothing.
MEASURED = f"""
import json, sys
from pathlib import Path
import jax
from meap_jax import hub
{PEAK}
hub.open_hub_model(Path(sys.argv[1]))  # Imports, compiles and allocates what doesn't grow with the model.
before = peak()
params = hub.open_hub_model(Path(sys.argv[2])).params
print(json.dumps([peak() - before, sum(x.nbytes for x in jax.tree.leaves(params))]))
"""


def test_a_model_comes_in_with_little_more_memory_than_its_parameters_take(tmp_path):
    sizes = dict(hidden_size=768, num_attention_heads=12, intermediate_size=2048, num_hidden_layers=4)
    write_model(tmp_path / "small", content_of("llama"))
    given = write_model(tmp_path / "large", content_of("llama", rows=100_000, **sizes))
    words = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, params = json.loads(done.stdout)
    assert peak - params < 1.3 * max(array.nbytes for array in given.values())


def test_a_hub_folder_is_evaluated_as_its_import_is(tmp_path):
    write_model(tmp_path / "hub", content_of("llama", max_position_embeddings=400))
    import_model(tmp_path / "hub", epath.Path(tmp_path / "ours"))
    asked = ["--tasks=kv", "--config.eval.kv.num_keys=2", "--config.eval.kv.positions=1,2"]
    asked += ["--config.eval.kv.max_questions=1"]
    for name, model in (("a", f"--hf={tmp_path / 'hub'}"), ("b", f"--workdir={tmp_path / 'ours'}")):
        evaluate.command(["evaluate", model, *asked, f"--out={tmp_path / name}.json"])
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a == b and len(a["examples"]["kv"]) == 2  # The same fingerprint, too.
    with pytest.raises(ConfigError, match="--hf is .*, a model without data"):
        evaluate.command(["evaluate", f"--hf={tmp_path / 'hub'}", "--tasks=retrieval", f"--out={tmp_path / 'c'}.json"])
    with pytest.raises(ConfigError, match="--hf needs --tasks and --out"):
        evaluate.command(["evaluate", f"--hf={tmp_path / 'hub'}"])
    with pytest.raises(ConfigError, match="give one of --workdir"):
        evaluate.command(["evaluate"])
