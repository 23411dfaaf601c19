"""How a query's attention is shared out among the segments of a text, for Tables 16 to 18 and Figure 6 of the paper.

A text is what comes before the answer, the answer, what comes after it, a query, and an end.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from meap_jax.analysis.attention import BLOCK, FIRST_TOKEN, Sees, look_of, observe, over_blocks
from meap_jax.errors import DataError
from meap_jax.model.decoder import Definition, Params
from meap_jax.model.visibility import causal
from meap_jax.tokenizers import Tokenizer

SEGMENTS = ("before", "answer", "after", "query", "eos")
PADDING = -1

# From which side keys are looked at. The paper doesn't say; its share of the end is above 0, which only the end and
# what follows can give it.
VIEWS = {
    "eos": "the end's last token, from which the answer would be predicted: the only one that sees all five segments",
    "query": "the query's last token; it doesn't see the end",
    "all": "each key's mean weight over all positions that see it",
}
# What a segment's score is, before the five are divided by their sum.
SCORES = {"mean": "mean over the segment's tokens", "sum": "sum over the segment's tokens"}


class Example(NamedTuple):
    """A text in five segments; spaces between them are the segments' own."""

    name: str
    before: str
    answer: str
    after: str
    query: str
    eos: str = ""  # Empty: the tokenizer's end of a document; else a text in its place.


# Four texts of our own, about what the paper's four are about: its strings are in captions that are not reproduced.
EXAMPLES = (
    Example(
        "Great Wall",
        before="Along the mountains of northern China runs a chain of walls and watchtowers that travellers have "
        "described for centuries. Many dynasties had a part in it.",
        answer=" Most of the Great Wall that stands today was built under the Ming dynasty.",
        after=" Millions of people come to walk on it every year.",
        query=" Question: Under which dynasty was most of today's Great Wall built? Answer:",
    ),
    Example(
        "Einstein",
        before="Albert Einstein was born in Ulm in 1879, worked at the patent office in Bern, and later taught in "
        "Zurich, Prague and Berlin. He is best known for the theory of relativity.",
        answer=" He received the Nobel Prize in Physics of 1921 for explaining the photoelectric effect.",
        after=" He spent his last years in Princeton.",
        query=" Question: For what did Einstein receive the Nobel Prize? Answer:",
    ),
    Example(
        "Colosseum",
        before="In the centre of Rome stands an oval arena of stone and concrete. Gladiators fought there in front of "
        "tens of thousands, and earthquakes and builders have since taken much of its stone.",
        answer=" The Colosseum was opened by the emperor Titus in the year 80.",
        after=" Today it is on the coins of five cents that Italy mints.",
        query=" Question: Which emperor opened the Colosseum? Answer:",
    ),
    Example(
        "Eiffel Tower",
        before="Paris has many towers, but one of them is known all over the world. It is made of iron, and was meant "
        "to stand for twenty years only.",
        answer=" The Eiffel Tower was built for the World's Fair of 1889.",
        after=" From its top one sees the whole city.",
        query=" Question: For which event was the Eiffel Tower built? Answer:",
    ),
)

# The paper's shares, MEAP and NTP, in the order of `SEGMENTS`.
PAPER = {
    "Great Wall": {
        "meap": (0.491, 0.329, 0.078, 0.067, 0.069),
        "ntp": (0.731, 0.108, 0.080, 0.070, 0.071),
        "note": "Table 16; it prints .80 for NTP's .080, and its shares sum to 1.034 and 1.060: its context-before "
        "pair is that of Figure 6, a copy error",
    },
    "Einstein": {
        "meap": (0.435, 0.386, 0.066, 0.057, 0.055),
        "ntp": (0.694, 0.115, 0.074, 0.060, 0.057),
        "note": "Table 17",
    },
    "Colosseum": {
        "meap": (0.579, 0.219, 0.071, 0.063, 0.068),
        "ntp": (0.748, 0.065, 0.067, 0.050, 0.069),
        "note": "Table 18",
    },
    "Eiffel Tower": {
        "meap": (0.49, 0.35, 0.06, 0.05, 0.05),
        "ntp": (0.73, 0.09, 0.06, 0.05, 0.06),
        "note": "Figure 6, read off its bars",
    },
}


# --------------------------------------------------------------------------------------------------------------- tokens


def encode(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of a text behind a begin of document, and the number of each one's segment in `SEGMENTS`.

    The begin belongs to `before`; a token that lies in two segments belongs to the one with its last character.

    Raises:
      DataError: a segment has no token.
    """
    texts = [getattr(example, name) for name in SEGMENTS]
    [(ids, offsets)] = tokenizer.encode_with_offsets(["".join(texts)])
    ends = np.cumsum([len(text) for text in texts])
    segments = np.searchsorted(ends, offsets[:, 1] - 1, side="right").tolist()
    ids, segments = [tokenizer.bos_id, *ids], [0, *segments]
    if not example.eos:
        ids, segments = [*ids, tokenizer.eos_id], [*segments, SEGMENTS.index("eos")]
    for number, name in enumerate(SEGMENTS):
        if number not in segments[1:]:
            raise DataError(f"the example {example.name!r} has no token of its own in {name!r}: give it some text.")
    return ids, segments


def padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Int[np.ndarray, "N T"]:
    """Rows of one length, int32."""
    return np.array([[*row, *[value] * (length - len(row))] for row in rows], np.int32)


# -------------------------------------------------------------------------------------------------------------- weights


@functools.partial(jax.jit, static_argnames=("definition", "block"))
def segment_statistics(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    *,
    definition: Definition,
    block: int = BLOCK,
) -> Float32[Array, "L B H 2 V 5"]:
    """The attention of all tokens of each segment together, in every layer and head.

    Args:
      params: of a decoder whose layers are stacked.
      tokens_BT: int32.
      segments_BT: of each token, a number in `SEGMENTS`, never decreasing; padding (-1) comes behind.
      definition: of the decoder.
      block: queries whose weights exist at a time.

    Returns:
      [num_layers, B, H, 2, V, 5] float32, in the order of `FIRST_TOKEN`, `VIEWS` and `SEGMENTS`.
    """
    one_hot_BST = jax.nn.one_hot(segments_BT, len(SEGMENTS), axis=1)  # 0 for padding.

    def last_of(segment: str) -> jax.Array:
        is_its_BT = segments_BT == SEGMENTS.index(segment)
        index = jnp.arange(segments_BT.shape[1])
        return index == jnp.where(is_its_BT, index, -1).max(axis=1, keepdims=True)

    views_BVT = jnp.stack([last_of("eos"), last_of("query"), segments_BT != PADDING], axis=1)

    def reduce(q_BTHd: jax.Array, k_BTKd: jax.Array, sees: Sees) -> jax.Array:
        cases = over_blocks(q_BTHd, k_BTKd, sees, views_BVT, block)
        attention = jnp.stack([attention_BHVT for attention_BHVT, _, _ in cases], axis=2)
        return jnp.einsum("BHCVT,BST->BHCVS", attention, one_hot_BST, precision=jax.lax.Precision.HIGHEST)

    return observe(definition, params, tokens_BT, look_of(causal(tokens_BT), definition.config.window, reduce))


# --------------------------------------------------------------------------------------------------------------- scores


def scores(
    sums: Float[np.ndarray, "*lead 2 V 5"], segments: Sequence[int]
) -> dict[str, Float[np.ndarray, "*lead 2 V 5"]]:
    """Scores of the five segments that sum to 1, from the attention of each segment's tokens together.

    Args:
      sums: as `segment_statistics` gives them, averaged over layers and heads as the caller likes: the mean is taken
        before the scores are divided by their sum.
      segments: the number of each token's segment; the first token's counts only with it.

    Returns:
      {name in `SCORES`: of the shape of sums}.
    """
    counts = np.bincount(segments, minlength=len(SEGMENTS)).astype(float)
    without = counts - np.eye(len(SEGMENTS))[segments[0]]
    by_case = np.stack([{"with": counts, "without": without}[case] for case in FIRST_TOKEN])
    found = {"mean": sums / by_case[:, None], "sum": np.asarray(sums)}
    return {name: found[name] / found[name].sum(axis=-1, keepdims=True) for name in SCORES}
