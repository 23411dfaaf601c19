"""Where a decoder looks when it is asked for a fact: attention from the question's last token to the stated value."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float32

from meap_jax.analysis.attention import Sees, attention_weights, look_of
from meap_jax.evals.facts import FactSet
from meap_jax.model.decoder import Definition, Params
from meap_jax.objective import clean_inputs
from meap_jax.rows import Row


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
