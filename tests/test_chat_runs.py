"""Runs that are fine-tuned on conversations: from a file to checkpoints, evaluations and prompts."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import chat_files
import tiny_runs
from chat_files import alpaca
from meap_jax import config as config_lib
from meap_jax import sharding
from meap_jax.checkpoint import Checkpointer, Keep
from meap_jax.cli import parse_config
from meap_jax.config import is_due
from meap_jax.data.pipeline import TrainBatches
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import Setting
from meap_jax.generator import Generator
from meap_jax.hf.tokenizer import open_hub_tokenizer
from meap_jax.hub import open_hub_model, sizes
from meap_jax.main import train
from meap_jax.models import open_model, origin_of
from meap_jax.run import open_run
from meap_jax.start import start
from meap_jax.train import compile_step
from tiny_models import mesh_of
from tokenizers import Tokenizer, models


def config_of(workdir, path, **overrides):
    """(config, workdir) of a run on a file."""
    return parse_config(["main", *chat_files.chat_flags(workdir, path, **overrides)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, (config, workdir)."""
    folder = tmp_path_factory.mktemp("chat")
    config, workdir = config_of(folder / "run", alpaca(folder / "alpaca.json"))
    train(config, workdir)
    return config, workdir


def assert_equal(tree, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, other)


def steps_of(workdir, key):
    return [record["step"] for record in tiny_runs.records(workdir) if key in record]


def test_each_epoch_ends_with_an_evaluation_and_a_checkpoint(finished):
    config, workdir = finished
    run = open_run(config, workdir)
    rows = len(run.prepared.blocks("text", "train"))
    steps = round(2 * rows / 8)
    assert run.config.num_steps == steps and config.num_steps == 8, "the config that was given stays"
    ends = [round(rows / 8), steps]
    assert steps_of(workdir, "validation_text/loss") == ends
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == ends


def test_masks_fall_in_copies_alone_in_a_run_too(finished):
    _, workdir = finished
    shares = [record["mask_fraction"] for record in tiny_runs.records(workdir)]
    assert all(0 < share < 0.1 for share in shares)


def test_a_run_that_is_interrupted_in_an_epoch_goes_on_bit_for_bit(finished, tmp_path):
    config, workdir = finished
    path = config.data.path
    stopped, elsewhere = config_of(tmp_path / "run", path, checkpoint__every=2, num_epochs=2, checkpoint__keep=99)
    train(stopped, elsewhere)
    steps = sorted(int(p.name) for p in (elsewhere / "checkpoints").iterdir() if p.name.isdigit())
    for step in steps[1:]:
        (elsewhere / "checkpoints" / str(step)).rmtree()
    train(stopped, elsewhere)
    assert tiny_runs.losses(elsewhere) == tiny_runs.losses(workdir)


def test_a_model_is_asked_in_the_template_it_was_trained_in_and_stops_where_its_answers_end(finished):
    config, workdir = finished
    opened = open_model(workdir)
    tokenizer = opened.tokenizer
    assert "### Instruction:" in tokenizer.chat_template
    assert origin_of(opened.meta)["stop_ids"] == [tokenizer.eos_id]
    ids = tokenizer.encode_chat([{"role": "user", "content": "the sea"}])
    assert tokenizer.decode(ids) == "<bos>### Instruction:\nthe sea\n\n### Response:\n"
    config = opened.model.config
    config.eval.chat = True
    setting = Setting.of_model(opened, "test", lambda: pytest.fail("no data"), None, "")
    assert setting.encode("the sea") == ids
    assert tokenizer.eos_id in Generator.of(opened)._stops


def test_ntp_takes_as_many_steps_as_meap_where_its_epochs_are_those_of_meap(finished, tmp_path):
    config, _ = finished
    steps = {}
    for name, overrides in {
        "meap": dict(sft__arrangement="separate"),
        "ntp": dict(objective__name="ntp", sft__arrangement="none"),
        "equal time": dict(objective__name="ntp", sft__arrangement="none", sft__epoch_of="separate"),
    }.items():
        arm, workdir = config_of(tmp_path / name, config.data.path, data__prepared=tmp_path / "data", **overrides)
        steps[name] = open_run(arm, workdir).config.num_steps
    assert steps["equal time"] == steps["meap"] > steps["ntp"]


def test_ntp_on_copies_is_said_since_it_may_be_a_slip(finished, tmp_path, caplog):
    config, workdir = config_of(tmp_path / "run", finished[0].data.path, objective__name="ntp")
    open_run(config, workdir)
    assert "sft.arrangement is shared_prefix: NTP learns MEAP's copies too, without masks" in caplog.text


@pytest.mark.parametrize(
    "arrangement, mesh",
    [
        ("shared_prefix", dict(data=2, fsdp=2, tensor=2)),
        ("shared_prefix", dict(fsdp=2, context=2)),
        ("concat", dict(data=2, context=2)),
    ],
)
def test_a_mesh_gives_the_losses_of_one_device(finished, arrangement, mesh, tmp_path):
    """On eight virtual devices: rows, parameters and the sequence split, with branches and copies in the rows."""
    config, _ = finished
    fields = dict(sft__arrangement=arrangement, sft__positions="restart", model__num_kv_heads=2)
    config, _ = config_of(tmp_path, config.data.path, data__prepared=tmp_path / "data", **fields)
    on_one, on_mesh = (losses_on(mesh_of(**sizes), config, tmp_path) for sizes in (dict(data=1), mesh))
    np.testing.assert_allclose(on_mesh, on_one, rtol=2e-5)


def losses_on(mesh, config, workdir):
    """The loss and the gradient norm of two steps on a mesh."""
    run = open_run(config, workdir, mesh)
    state = start(run, Checkpointer(workdir, Keep(1))).state
    layout = sharding.batch_sharding(run.mesh)
    batches = TrainBatches(run.prepared, {"text": 1.0}, seed=0, batch_size=8, sharding=layout)
    step, values = compile_step(run.config, run.definition, run.mesh), []
    with jax.set_mesh(run.mesh):
        for _ in range(2):
            state, metrics = step(state, next(batches))
            values.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return values


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "overrides, said",
    [
        (dict(sft__arrangement="none"), "sft.arrangement is 'none', but objective.name is 'meap'"),
        (dict(data__sources__text__format="text"), "sft.arrangement is 'shared_prefix', but no source of data.mixture"),
        (dict(data__mixture="text=1,retrieval=1"), "data.mixture is 'text=1,retrieval=1', but retrieval has no conver"),
        (dict(objective__strategy="official"), "objective.strategy is 'official', but that is the official code's of "),
        (dict(data__sources__text__max_tokens=99), "data.sources.text.max_tokens is 99, but a source of conversations"),
        (
            dict(sft__masks="static", objective__strategy="span"),
            "objective.strategy is 'span', but masks of sft.masks=",
        ),
        (dict(objective__where="only:answer"), "objective.where is 'only:answer', but masks of conversations fall in "),
        (dict(objective__name="fcm"), "objective.name is 'fcm', but fine-tuning on conversations has copies of answer"),
        (dict(num_epochs=0), "checkpoint.every is 0, but must be 1 or more where num_epochs is 0"),
        (dict(sft__rows_per_mean=3), "sft.rows_per_mean is 3, but must be 0 or a divisor of global_batch_size (8)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, overrides, said):
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, tmp_path / "alpaca.json", **overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_too_many_samples_longer_than_a_block_are_an_error_with_the_line_of_the_first(finished, tmp_path):
    path = alpaca(tmp_path / "alpaca.json", number=60)
    skipping = dict(sft__too_long="skip", data__max_skipped=0, seq_len=100, data__holdout=0.2)
    config, workdir = config_of(tmp_path / "run", path, **skipping)
    with pytest.raises(DataError, match=r"conversations of text \(the first on line \d+ of its file\) have more"):
        open_run(config, workdir)
    config, workdir = config_of(tmp_path / "run", path, **skipping | dict(data__max_skipped=50))
    assert open_run(config, workdir).prepared.plan_manifest("text")["splits"]["train"]["skipped"] > 0


def test_a_split_without_a_conversation_is_an_error_that_says_what_to_do(tmp_path):
    config, workdir = config_of(tmp_path / "run", alpaca(tmp_path / "alpaca.json", 5), data__holdout=0.01)
    with pytest.raises(DataError, match=r"no conversation for validation among its 5: raise data.holdout"):
        open_run(config, workdir)


def test_a_tokenizer_without_room_for_mask_in_the_model_is_an_error(tmp_path):
    options = dict(data__tokenizer="mistral", model__vocab_size=32_000, objective__mask_id=3)
    config, workdir = config_of(tmp_path / "run", alpaca(tmp_path / "alpaca.json"), **options)
    with pytest.raises(ConfigError, match="model.vocab_size is 32000, but the tokenizer mistral has 32001 ids"):
        open_run(config, workdir)


def test_epochs_end_at_the_steps_that_are_nearest_to_them():
    c = config_lib.base()
    c.num_epochs, c.num_steps = 3.0, 10
    assert [step for step in range(1, 11) if is_due(c, 0, step)] == [3, 7, 10]
    assert [step for step in range(1, 11) if is_due(c, 4, step)] == [4, 8, 10]
    c.num_epochs = 2.5
    assert [step for step in range(1, 11) if is_due(c, 0, step)] == [4, 8, 10]


def test_the_configs_of_the_paper_are_valid_and_differ_in_what_they_say():
    configs = {}
    for path in sorted((tiny_runs.ROOT / "configs").glob("sft_*.py")):
        config = importlib.import_module(f"configs.{path.stem}").get_config()
        config_lib.check(config, needs_data=False)
        configs[path.stem] = config
        assert config.data.tokenizer == f"{config.init_from}/tokenizer"
    assert len(configs) >= 10
    meap, same_time = configs["sft_llama3_8b_meap"], configs["sft_llama3_8b_ntp_equal_time"]
    assert same_time.sft.epoch_of == meap.sft.arrangement and same_time.num_epochs == meap.num_epochs
    assert config_lib.fine_tuning("llama3_8b", "ntp", "section_4_2").optimizer.weight_decay == 0.01


def test_each_checkpoint_is_written_for_transformers_too(finished, tmp_path):
    config, _ = finished
    exporting = dict(checkpoint__export="merge", data__prepared=tmp_path / "data", num_epochs=1, checkpoint__every=2)
    config, workdir = config_of(tmp_path / "run", config.data.path, **exporting)
    state = train(config, workdir)
    steps = sorted(int(path.name) for path in (workdir / "export").iterdir())
    last = open_run(config, workdir).config.num_steps
    assert steps == sorted({*range(2, last, 2), last}), "exports stay where checkpoints are cleared away"
    newest = workdir / "export" / str(steps[-1])
    opened = open_hub_model(Path(newest))
    assert_equal(state.params["layers"], opened.params["layers"])
    written = opened.tokenizer.num_own_ids  # Rows that pad the vocabulary are not.
    assert_equal(state.params["embedding"][:written], opened.params["embedding"][:written])
    assert "### Instruction:" in opened.tokenizer.chat_template
    assert origin_of(opened.meta)["stop_ids"] == [opened.tokenizer.eos_id]


def test_adapters_alone_are_refused_before_a_step_where_all_parameters_train(finished, tmp_path):
    config, _ = finished
    config, workdir = config_of(tmp_path / "run", config.data.path, checkpoint__export="peft")
    with pytest.raises(ConfigError, match=r"adapters are to be written alone \(peft\), but the model has no adapters"):
        train(config, workdir)
    assert not (workdir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "overrides, exported",
    [
        (dict(checkpoint__export="merge"), "model.safetensors"),
        (dict(checkpoint__export="merge", frozen_dtype="nf4"), "model.safetensors"),
        (dict(checkpoint__export="peft", frozen_dtype="bfloat16"), "adapter_model.safetensors"),
    ],
)
def test_runs_with_adapters_write_each_checkpoint_too_and_go_on(finished, tmp_path, overrides, exported):
    adapters = dict(model__lora__rank=2, trainable="*lora*", num_epochs=0, num_steps=4, eval__every=9)
    fields = dict(checkpoint__every=2, data__prepared=tmp_path / "data") | adapters | overrides
    config, workdir = config_of(tmp_path / "run", finished[0].data.path, **fields)
    train(config, workdir)
    files = [workdir / "export" / step / exported for step in ("2", "4")]
    assert all(file.exists() for file in files) and files[0].read_bytes() != files[1].read_bytes()
    # What was interrupted between a checkpoint and its export is made up for.
    content = files[1].read_bytes()
    files[1].parent.rmtree()
    train(config, workdir)
    assert files[1].read_bytes() == content


def test_a_validation_loss_does_not_depend_on_how_training_averages(finished, tmp_path):
    found = []
    for rows in (0, 2):
        fields = dict(sft__rows_per_mean=rows, num_epochs=0, num_steps=1, eval__every=1, checkpoint__every=9)
        config, workdir = config_of(tmp_path / str(rows), finished[0].data.path, **fields)
        train(config, workdir)
        [record] = tiny_runs.records(workdir)
        found.append(record)
    means, plain = found[1], found[0]
    assert means["num_targets"] == plain["num_targets"] > 8
    for name in ("loss", "masked_loss"):
        assert means[f"validation_text/{name}"] == pytest.approx(plain[f"validation_text/{name}"], rel=0.01)


def test_a_row_holds_one_sample_where_they_are_not_packed(finished, tmp_path):
    config, workdir = config_of(tmp_path / "run", finished[0].data.path, sft__packed=False, sft__arrangement="separate")
    run = open_run(config, workdir)
    counts = run.prepared.plan_manifest("text")["splits"]["train"]
    assert counts["blocks"] == counts["samples"] + counts["with_copy"]
    blocks = run.prepared.blocks("text", "train")
    assert all(blocks[i].segment_ids.max() == 1 for i in range(len(blocks)))


def test_samples_without_room_for_their_copy_are_counted_and_said(finished, tmp_path, caplog):
    config, workdir = config_of(tmp_path / "run", finished[0].data.path, sft__arrangement="concat", seq_len=110)
    counts = open_run(config, workdir).prepared.plan_manifest("text")["splits"]["train"]
    assert counts["without_room"] > 0
    assert f"{counts['without_room']} samples have no room for their copy in a row" in caplog.text


def model_of_ids(folder, words, specials):
    """A tokenizer of the hub with so many words and these special tokens behind them."""
    made = Tokenizer(models.BPE(vocab={f"w{i}": i for i in range(words)}, merges=[]))
    made.add_special_tokens(specials)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(bos_token=specials[0], eos_token=specials[1])))
    return open_hub_tokenizer(folder)[0]


@pytest.mark.parametrize(
    "name, rows, words, specials",
    [
        ("llama3_8b", 128_256, 128_000, ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                                         *(f"<|reserved_special_token_{i}|>" for i in range(1, 254))]),
        ("llama32_3b", 128_256, 128_000, ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                                          "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
                                          *(f"<|reserved_special_token_{i}|>" for i in range(2, 253))]),
        ("qwen25_14b", 152_064, 151_643, ["<|endoftext|>", "<|im_start|>", *(f"<|other_{i}|>" for i in range(20))]),
    ],
)  # fmt: skip
def test_configs_have_the_sizes_that_an_import_gives_the_papers_models(tmp_path, name, rows, words, specials):
    """By tokenizers with as many words and special tokens as theirs have."""
    tokenizer = model_of_ids(tmp_path, words, specials)
    shape = config_lib.HUB_MODELS[name]
    assert sizes(rows, tokenizer) == dict(vocab_size=shape["vocab_size"], num_tokens=shape["num_tokens"])
    assert tokenizer.mask_id == shape["mask_id"]
