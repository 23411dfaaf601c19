"""Attention around stated values: shares of one, and the picture."""

import jax
import numpy as np

import tiny_runs
import tiny_settings
from experiments import look_up
from meap_jax.evals.facts import Kind, make_set
from meap_jax.model.decoder import Definition
from tokenizer_kinds import kind


def test_attention_around_a_value_is_a_share_of_that_to_all_the_question_sees():
    setting = tiny_settings.setting()
    definition: Definition = setting.model.definition
    params = tiny_settings.params(setting)
    asked = make_set(kind("bpe"), [Kind(3, 0, 4)], 16, 16, 0)
    T = asked.rows.tokens.shape[1]
    whole = look_up.attention_around_values(definition, params, asked, T)
    assert whole.shape == (2, 4, 2 * T + 1)
    np.testing.assert_allclose(whole.sum(axis=-1), 1, rtol=1e-5)
    distances = asked.answers["distance"]
    assert (whole[..., T + distances.max() :] == 0).all()  # Behind the farthest question nothing is seen ...
    assert (whole[..., T + distances.min() - 1] > 0).all()  # ... and a question sees itself.
    near = look_up.attention_around_values(definition, params, asked, 2)
    np.testing.assert_allclose(near, whole[..., T - 2 : T + 3], rtol=1e-6)


def test_the_first_layer_attends_as_its_queries_and_keys_say():
    """Against the definition, for one answer."""
    setting = tiny_settings.setting()
    definition, params = setting.model.definition, tiny_settings.params(setting)
    asked = make_set(kind("bpe"), [Kind(2, 0, 1)], 16, 16, 0)
    one = asked._replace(answers=asked.answers[:1])
    [[row, start, _, *_, distance]] = one.answers.tolist()
    found = look_up.attention_around_values(definition, params, one, 1)

    decoder = definition.decoder(params)
    layer = jax.tree.map(lambda x: x[0], params["layers"])
    x = decoder.embedding[...][asked.rows.tokens[row, :start]]
    x = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5) * layer["attn_norm"]["scale"]
    c = definition.config
    angles = np.arange(start)[:, None] * c.rope_base ** (-np.arange(0, c.head_dim, 2) / c.head_dim)

    def turned(y):
        a, b = np.split(y, 2, axis=-1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = (turned(np.einsum("TD,DHd->THd", x, layer["attn"][f"{name}_proj"])) for name in "qk")
    for head in range(c.num_heads):
        scores = k[:, head // (c.num_heads // c.num_kv_heads)] @ q[-1, head] / np.sqrt(c.head_dim)
        weights = np.exp(scores - scores.max())
        stated = start - distance
        np.testing.assert_allclose(found[0, head], (weights / weights.sum())[stated - 1 : stated + 2], rtol=1e-4)


def test_the_command_draws_its_picture(tmp_path, capsys):
    look_up.command(["look_up", *tiny_runs.flags(tmp_path, num_steps=10)])
    assert (tmp_path / "look_up.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {tmp_path / 'look_up.png'}" in capsys.readouterr().out
