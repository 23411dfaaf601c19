"""Draws where a decoder looks when it is asked for a fact, before and after it learned to look facts up.

python -m experiments.look_up --config=configs/quickstart.py --workdir=runs/look_up [--config.field=value ...]

Trains NTP and both arms of MEAP of `experiments.compare` with one seed, and draws the attention from the last token of
a question to the tokens around the value where it is stated, of the head that ends with most on the value:
WORKDIR/look_up.png.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Array, Float32
from matplotlib.figure import Figure

from experiments import population
from experiments.arms import check_arms
from experiments.compare import ARMS, probes, steps_of_a_turn
from experiments.members import Member
from meap_jax import cli
from meap_jax.analysis.attention import Sees, attention_weights, look_of
from meap_jax.evals.facts import FactSet
from meap_jax.model.decoder import Definition, Params
from meap_jax.objective import clean_inputs
from meap_jax.rows import Row
from meap_jax.run import Run, make_folder, open_run

SHOWN = ("ntp", "meap", "meap_ramped")
REACH = 4  # Tokens on either side of the value.
MOMENTS = (0.1, 0.4, 1.0)  # Shares of the run: before looking up begins, before a ramp begins, and the end.
COLORS = ("0.75", "#56b4e9", "#d55e00")
TITLES = {"trained": "documents like those trained on", "longer": "longer documents"}


def attention_around_values(
    definition: Definition, params: Params, asked: FactSet, reach: int
) -> Float32[np.ndarray, "L H 2*reach+1"]:
    """The mean attention to the tokens around a value where it is stated, from the token that must name it.

    Args:
      definition, params: of the decoder.
      asked: documents with their answers; whole rows of weights are held, so they should be short.
      reach: tokens on either side of the value's first one, which is in the middle of the result. A token that is
        outside the row gets none.
    """
    weights_LBHTT = jax.device_get(_weights(definition, params, asked.rows))
    answers = asked.answers
    query = answers["start"] - 1
    keys = (answers["start"] - answers["distance"])[:, None] + np.arange(-reach, reach + 1)
    T = weights_LBHTT.shape[-1]
    of_answers = weights_LBHTT[:, answers["row"][:, None], :, query[:, None], np.clip(keys, 0, T - 1)]
    # Advanced indices first: [A, keys, L, H].
    return np.where(((keys >= 0) & (keys < T))[..., None, None], of_answers, 0).mean(axis=0).transpose(1, 2, 0)


@functools.partial(jax.jit, static_argnums=0)
def _weights(definition: Definition, params: Params, rows: Row) -> Float32[Array, "L B H T T"]:
    """All attention weights."""
    inputs = clean_inputs(rows)

    def reduce(q_BTHd: jax.Array, k_BTKd: jax.Array, sees: Sees) -> jax.Array:
        return attention_weights(q_BTHd, k_BTKd, sees(0, q_BTHd.shape[1]))

    look = look_of(inputs.visibility, definition.config.window, reduce)
    return definition.decoder(params).observe(inputs.tokens, inputs.visibility, look)


def draw(run: Run, members: Sequence[Member], asked: Mapping[str, FactSet], every: int, file: epath.Path) -> None:
    """Draws a row of panels for each member, a column for each set, and a line for each moment.

    Args:
      run: whose arms the members are.
      members: that kept their parameters at the moments.
      asked: sets of documents.
      every: steps of a turn.
      file: of the picture.
    """
    figure = Figure(figsize=(10, 2.6 * len(members)), layout="constrained")
    panels = figure.subplots(len(members), len(asked), sharex=True, sharey=True, squeeze=False)
    offsets = np.arange(-REACH, REACH + 1)
    for row, member in zip(panels, members, strict=True):
        for panel, (name, documents) in zip(row, asked.items(), strict=True):
            found = [
                attention_around_values(run.definition, member.kept[step], documents, REACH)
                for step in steps_of_moments(run.config, every)
            ]
            layer, head = np.unravel_index(found[-1][..., REACH].argmax(), found[-1].shape[:2])
            for share, color, weights in zip(MOMENTS, COLORS, found, strict=True):
                panel.plot(
                    offsets, weights[layer, head], "o-", color=color, markersize=4, label=f"{share:.0%} of the run"
                )
            title = f"{member.arm.label}, {TITLES[name]}: layer {layer + 1}, head {head + 1}"
            panel.set_title(title, fontsize=9)
            panel.grid(alpha=0.3)
            panel.set_xticks(offsets, _words(run, documents), fontsize=8)
        row[0].set_ylabel("mean attention", fontsize=9)
    panels[0][0].legend(frameon=False, fontsize=8)
    with file.open("wb") as out:
        figure.savefig(out, format="png", dpi=120)


def steps_of_moments(config: ml_collections.ConfigDict, every: int) -> list[int]:
    """The steps at MOMENTS, multiples of `every`."""
    return [max(every, round(share * config.num_steps / every) * every) for share in MOMENTS]


def _words(run: Run, documents: FactSet) -> list[str]:
    """The tokens around the first value that has so many on both sides, as names of the offsets."""
    for answer in documents.answers:
        stated = int(answer["start"] - answer["distance"])
        tokens = documents.rows.tokens[answer["row"], stated - REACH : stated + REACH + 1]
        if stated >= REACH and len(tokens) == 2 * REACH + 1:
            return [run.prepared.tokenizer.decode([int(token)]).strip() or "." for token in tokens]
    return [f"{offset:+d}" for offset in range(-REACH, REACH + 1)]


def command(argv: list[str]) -> None:
    """Trains and draws as the command line says."""
    config, workdir = cli.parse_config([argv[0], "--workdir=runs/look_up", *argv[1:]])
    population.check_mesh(config)
    check_arms(config, ARMS)
    make_folder("workdir", workdir)
    population.use_all_cores()
    run = open_run(config, workdir, population.evaluation_mesh(config, jax.devices()))
    every = steps_of_a_turn(config.num_steps)
    arms = [arm for arm in ARMS if arm.name in SHOWN]
    keep, asked = steps_of_moments(config, every), probes(run)
    members = population.train(run, arms, [config.seed], every=every, questions=asked, keep=keep)
    draw(run, members, asked, every, workdir / "look_up.png")
    print(f"picture: {workdir / 'look_up.png'}")


if __name__ == "__main__":
    cli.run_command(command)
