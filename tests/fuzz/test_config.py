"""Overrides on the command line, and configs that a run wrote: a config that passes every check, or one sentence."""

import json
import pathlib
import tempfile

from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import JSON, altered, damaged, refused_in_a_sentence, settings
from meap_jax import cli
from meap_jax import config as config_lib
from meap_jax.fields import fields_of
from meap_jax.models import read_config
from tiny_runs import ROOT, tiny_config

FIELDS = sorted(fields_of(["text"]))
ODD_TEXTS = (
    "", "0", "-1", "1e20", "nan", "inf", "True", "None", "()", "[1]", "{}", "9" * 5_000, "1_0", "0x10", "٣", "\x00",
    "a=b", "--config.seed=1", "$(true)", "__import__('os').abort()", "../../etc/passwd", "0-99999999999",
)  # fmt: skip
VALUES = st.integers().map(str) | st.floats().map(str) | st.text(max_size=12) | st.sampled_from(ODD_TEXTS)
ODD_WORDS = (
    "--", "--config", "--config=", "-config.x", "--config.=", "--noconfig.seed", "--config.model", "--config.a[0]=1",
    "--config..=", "--workdir", "--undefok=x", "--config.seed[0]=1", "--noconfig.objective.ratio_per_row",
)  # fmt: skip
OVERRIDES = st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3)


@settings
@given(OVERRIDES)
@example([("model.window_layers", "0-99999999999")])
@example([("seeds.mask", "9" * 5_000)])
def test_any_override_gives_a_config_or_one_sentence(overrides):
    words = [f"--config.{name}={value}" for name, value in overrides]
    with refused_in_a_sentence():
        config, workdir = cli.parse_config(["main", f"--config={ROOT / 'configs' / 'quickstart.py'}", *words])
        assert workdir.is_absolute()
        for name, field in fields_of(config.data.sources).items():
            value = config_lib.flatten(config)[name]
            assert value is None or type(value) is field.type, name


@settings
@given(st.lists(st.text(max_size=20) | st.sampled_from(ODD_WORDS), max_size=4))
def test_any_command_line_gives_a_config_or_one_sentence(words):
    with refused_in_a_sentence():
        cli.parse_config(["main", f"--config={ROOT / 'configs' / 'quickstart.py'}", *words])


WRITTEN = tiny_config().to_dict()


@settings
@given(altered(WRITTEN).map(lambda content: json.dumps(content).encode()) | damaged(json.dumps(WRITTEN).encode()))
@example(b"[" * 100_000)
@example(b"null")
@example(b'{"data": 3}')
@example(b'{"data": {"sources": {"text": 1}}}')
def test_a_config_that_a_run_wrote_is_read_back_whole_or_refused(data):
    with tempfile.TemporaryDirectory() as folder, refused_in_a_sentence():
        pathlib.Path(folder, "config.json").write_bytes(data)
        config = read_config(epath.Path(folder))
        config_lib.check(config, needs_data=False)


@settings
@given(st.dictionaries(st.text(max_size=5) | st.sampled_from(("data", "model", "seed", "mesh")), JSON, max_size=4))
def test_a_config_of_any_form_is_read_back_or_refused(content):
    with refused_in_a_sentence():
        config_lib.check(config_lib.read_back(content), needs_data=False)
