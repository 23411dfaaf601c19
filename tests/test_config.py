"""Every field that cannot work is refused in one sentence; every config of the repository passes."""

import functools
import importlib
import json
import math
import re
import runpy
import sys

import ml_collections
import pytest

from meap_jax import cli
from meap_jax import config as config_lib
from meap_jax.config import TYPES, changed_on_resume, check, flatten, mixture, seed_of
from meap_jax.errors import ConfigError
from meap_jax.fields import fields_of
from tiny_runs import ROOT, tiny_config

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


# -------------------------------------------------------------------------------------------------------- what is valid


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads_and_passes(path):
    c = runpy.run_path(str(path))["get_config"]()
    if "retrieval" not in mixture(c):
        with pytest.raises(ConfigError, match="data.path is not set: name a folder of .txt or .jsonl files"):
            check(c)
        c.data.path = "/data/books"
    check(c)
    check(ml_collections.ConfigDict(json.loads(json.dumps(c.to_dict()))))  # As a workdir keeps it.
    assert flatten(c).keys() == fields_of(c.data.sources).keys()
    assert not [name for name, value in flatten(c).items() if isinstance(value, list)]


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"objective.mask_ratio": 0.0}, {"objective.mask_ratio": 1.0}, {"seed": 2**32 - 1}, {"seeds.mask": 0},
        {"optimizer.warmup_fraction": 0.0}, {"optimizer.weight_decay": 0.0}, {"optimizer.clip_norm": math.inf},
        {"data.retrieval.max_fillers": 0}, {"mesh.fsdp": 8}, {"data.mixture": "text=1", "data.prepared": "/prepared"},
        {"seq_len": 4, "objective.strategy": "official", "objective.mask_ratio": 0.75},
    ],
    ids=str,
)  # fmt: skip
def test_the_defaults_and_the_edges_of_what_is_valid_pass(fields):
    c = config_lib.base()
    c.update_from_flattened_dict(fields)
    check(c)


# ------------------------------------------------------------------------------------------------------ what is refused

WRONG = [
    (name, value, check)
    for name, field in fields_of(["text"]).items()
    for i, check in enumerate(field.checks)
    for value in (*check.wrong, *([math.nan] if isinstance(field.default, float) and i == 0 else []))
]


@pytest.mark.parametrize("name, value, check", WRONG, ids=lambda x: str(x) if isinstance(x, str | float | int) else "")
def test_an_impossible_field_is_stopped_by_its_name_its_value_and_what_would_be_valid(name, value, check):
    c = config_lib.base()
    c.update_from_flattened_dict(dict(check.given) | {name: value})
    with pytest.raises(ConfigError) as error:
        config_lib.check(c)
    values = flatten(c.data.sources.text if name.startswith("data.sources.") else c)
    assert str(error.value) == f"{name} is {flatten(c)[name]!r}, but must be {check.expected(values)}."


@pytest.mark.parametrize("name, field", fields_of(["text"]).items(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_value_of_another_type_is_refused_by_name_and_never_rounded(name, field):
    wrong = {int: (1.5, 3.0, True, "3"), float: ("0.1", True), bool: (1, "yes"), str: (1, b"text")}[field.type]
    for value in wrong:
        config = config_lib.base().to_dict()  # ConfigDict has checks of its own, but a file can hold anything.
        *groups, last = name.split(".")
        functools.reduce(lambda group, key: group[key], groups, config)[last] = value
        with pytest.raises(ConfigError) as error:
            check(ml_collections.ConfigDict(config))
        assert str(error.value) == f"{name} is {value!r}, but must be {TYPES[field.type]}."


@pytest.mark.parametrize("name, value, most", [
    ("num_steps", 2**31, "2,147,483,648"), ("global_batch_size", 10**11, "2,147,483,648"),
    ("objective.span_length", 10**12, "2,147,483,648"), ("model.num_layers", 10**9, "65,536"),
    ("model.window", 2**40, "2,147,483,648"), ("data.sources.text.max_tokens", 2**63, "9,223,372,036,854,775,808"),
])  # fmt: skip
def test_a_number_that_no_device_counts_to_is_refused_with_the_bound(name, value, most):
    with pytest.raises(ConfigError) as error:
        check(tiny_config(**{name: value}))
    assert str(error.value) == f"{name} is {value}, but must be below {most}."


def test_a_step_has_no_more_tokens_than_an_int32_counts():
    check(tiny_config(global_batch_size=2**20, seq_len=2**11 - 2))
    with pytest.raises(ConfigError, match=r"^global_batch_size is 1,048,576, .*these are 2,147,483,648\).$"):
        check(tiny_config(global_batch_size=2**20, seq_len=2**11 - 1))


def test_ranges_of_layers_that_are_not_there_cost_no_memory():
    with pytest.raises(ConfigError, match="model.window_layers is '0-99999999999', but must be all, or layers from 0"):
        check(tiny_config(**{"model.window_layers": "0-99999999999"}))


QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--config=nowhere/x.py"], "--config is 'nowhere/x.py', which does not exist: name one such as configs/quick"),
        (["--config", "configs/nope.py:1b"], "--config is 'configs/nope.py:1b', which does not exist"),
        ([f"--config={ROOT}"], f"--config is '{ROOT}', which is no file: name one such as configs/quickstart.py."),
        (["--config=/dev/zero"], "--config is '/dev/zero', which is no file"),
        (["--config"], "--config is '', which does not exist"),
        ([QUICKSTART, "--config.num_steps=1e20"], "num_steps is '1e20', but must be a whole number."),
        ([QUICKSTART, "--config.objective.mask_id=1.5"], "objective.mask_id is '1.5', but must be a whole number."),
        ([QUICKSTART, "--config.seeds.mask=x=y: z"], "seeds.mask is 'x=y: z', but must be a whole number."),
        ([QUICKSTART, f"--config.num_steps={'9' * 5000}"], "... (5,002 characters), but must be a whole number."),
        ([QUICKSTART, "--config.optimizer.eps=small"], "optimizer.eps is 'small', but must be a number."),
        ([QUICKSTART, "--config.eval.chat=maybe"], "eval.chat is 'maybe', but must be True or False."),
        ([QUICKSTART, "--config.model={}"], "the config lacks the field model.num_layers"),
        ([QUICKSTART, "--config.optimizer.learning_rate=1e400"], "optimizer.learning_rate is inf, but must be"),
    ],
    ids=lambda x: str(x)[-40:],
)  # fmt: skip
def test_a_command_line_that_names_no_file_or_no_value_gets_one_sentence(words, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        cli.parse_config(["main", *words])
    assert "\n" not in str(error.value)


def test_a_file_that_returns_no_config_is_refused(tmp_path):
    (tmp_path / "c.py").write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError, match=r"^get_config\(\) in the file of --config returns NoneType, but must"):
        cli.parse_config(["main", f"--config={tmp_path / 'c.py'}"])


def test_every_field_says_what_it_means():
    assert all(field.doc.endswith((".", "...")) for field in fields_of(["text"]).values())


SHORT_OFFICIAL = {"seq_len": 4, "objective.strategy": "official"}
UNREADABLE = ("wikipedia=1", "stdlib=0", "stdlib=-1", "stdlib=much", "stdlib=nan", "text=inf", "", ",")


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"model.num_layers": 0}, "model.num_layers is 0, but must be at least 1."),
        ({"seeds.mask": 2**32}, "seeds.mask is 4294967296, but must be in [0, 2^32)."),
        ({"optimizer.decay_on": "norms"}, "optimizer.decay_on is 'norms', but must be one of all, matrices."),
        ({"objective.mask_id": 64}, "objective.mask_id is 64, but must be an id below model.vocab_size (64)."),
        ({"model.num_kv_heads": 8}, "model.num_kv_heads is 8, but must be a divisor of model.num_heads (4)."),
        ({"loss.z_loss": math.inf}, "loss.z_loss is inf, but must be 0 or more."),
        ({"data.tokenizer": "gpt"}, "mistral, tekken, or a path with a / or the ending .model or .json."),
        ({"data.sources.text.keep_shorter": 0.1}, "must be 1 unless long_from says below what length."),
        (SHORT_OFFICIAL | {"objective.mask_ratio": 0.76}, "is 0.76, but must be at most 0.75 with objective.strategy"),
        ({"mesh.fsdp": -1}, "'fsdp': -1, 'tensor': 1}, but only one axis may be -1."),
        ({"data.mixture": "text,stdlib,text=2"}, "data.mixture is 'text,stdlib,text=2', but must name text once."),
        *(({"data.mixture": mixture}, "among stdlib, retrieval, text.") for mixture in UNREADABLE),
    ],
    ids=str,
)
def test_what_would_be_valid_is_said_in_plain_words(fields, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence) + "$" * sentence.endswith(".")):
        check(tiny_config(**fields))


def test_a_misspelt_field_cannot_be_set():
    with pytest.raises(AttributeError, match="mask_rate.*Did you mean.*mask_ratio"):
        config_lib.paper("1b", "meap").objective.mask_rate = 1


# -------------------------------------------------------------------------------------------------------------- reading


def test_a_mixture_is_sources_with_weights_in_the_order_written():
    weights = mixture(tiny_config(**{"data.mixture": "retrieval=0.25, stdlib=3,text"}))
    assert list(weights.items()) == [("retrieval", 0.25), ("stdlib", 3.0), ("text", 1.0)]


def test_the_seed_of_a_use_is_its_own_if_set_else_the_runs():
    c = tiny_config(**{"seed": 5, "seeds.mask": 9, "seeds.noise": 0})
    assert [seed_of(c, name) for name in ("init", "data", "mask", "noise")] == [5, 5, 9, 0]


def test_what_does_not_change_the_experiment_may_change_on_resume():
    names = "num_steps log.every eval.every eval.max_rows checkpoint.every checkpoint.keep mesh.data data.max_skipped"
    other = tiny_config(**dict.fromkeys(names.split(), 7), **{"data.prepared": "/moved"})
    assert changed_on_resume(tiny_config().to_dict(), other) == {}


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("seed", 0, 1), ("seeds.mask", None, 1), ("global_batch_size", 8, 64), ("objective.mask_ratio", 0.15, 0.2),
        ("model.num_layers", 2, 3), ("optimizer.learning_rate", 1e-2, 1e-3), ("data.retrieval.num_facts", 8, 4),
        ("init_from", None, "/runs/other"),
    ],
)  # fmt: skip
def test_any_other_change_on_resume_is_named_with_both_values(name, old, new):
    assert changed_on_resume(tiny_config().to_dict(), tiny_config(**{name: new})) == {name: (old, new)}


def test_a_field_that_came_later_counts_as_its_default_and_one_that_is_unknown_as_changed():
    old = tiny_config().to_dict()
    del old["seeds"], old["loss"], old["data"]["sources"]["text"]["epochs"]
    assert changed_on_resume(old, tiny_config()) == {}
    assert changed_on_resume(old, tiny_config(**{"loss.z_loss": 1e-4})) == {"loss.z_loss": (0.0, 1e-4)}
    old["objective"]["forgotten"] = 1
    assert changed_on_resume(old, tiny_config()) == {"objective.forgotten": (1, None)}


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "name",
    [
        "meap_jax.main", "meap_jax.corpus.prepare", "meap_jax.corpus.beam", "meap_jax.aot.__main__",
        "experiments.compare", "experiments.onset", "experiments.look_up", "experiments.mask_ratio",
        "experiments.cloud.mask_ratio",
    ],
)  # fmt: skip
def test_help_shows_the_usage_and_every_field(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    cli.run_command(importlib.import_module(name).command)
    shown = capsys.readouterr().out
    assert f"python -m {name.removesuffix('.__main__')} --config=" in shown
    for name, field in fields_of(["NAME"]).items():
        assert f"  {name} = " in shown and field.doc.split()[-1] in shown
