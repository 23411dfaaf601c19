"""Every field that cannot work is refused in one sentence; every config of the repository passes."""

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
from meap_jax.config import changed_on_resume, check, flatten, mixture, seed_of
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
