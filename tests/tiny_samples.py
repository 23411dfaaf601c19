"""Small stores of conversations, and the loss of a sample by itself, in plain JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meap_jax.data import plans
from meap_jax.data.samples import SampleBlocks, plan_pieces, spec_of
from meap_jax.data.spec import ChatPlanSpec, SampleSpec
from meap_jax.data.store import EncodedDocument, TokenSpan
from meap_jax.model.visibility import Visibility, causal
from meap_jax.rows import stacked
from tiny_data import make_store

BOS, END, MASK, VOCAB = 1, 2, 3, 64  # END ends an answer.
RATIO, SEED = 0.1, 5


def document(rng, turns):
    """A conversation of random tokens: `turns` are (length of a prompt, length of an answer with its end) each."""
    ids, spans = [BOS], []
    for prompt, answer in turns:
        ids += rng.integers(4, VOCAB, prompt).tolist()
        spans.append(TokenSpan(len(ids), answer, "answer", {"line": 1.0}))
        ids += [*rng.integers(4, VOCAB, answer - 1).tolist(), END]
    return EncodedDocument(ids, tuple(spans))


def chat_store(folder, documents, split=0):
    """A store of conversations, all of one split."""
    return make_store(folder, [[(split, document) for document in documents]])


def plan_spec(arrangement, block_len, longer_than=50, too_long="truncate", loss="answers_and_masked"):
    """How samples are packed."""
    return ChatPlanSpec(0, 0, 1.0, "best_fit", block_len - 1, 0, arrangement, longer_than, too_long, loss, True)


def sample_spec(positions="run_on", masks="static"):
    """What rows say of samples."""
    return SampleSpec(positions, masks, RATIO, SEED)


def blocks_of(store, spec, samples, split="train"):
    """The blocks of a split of a store."""
    [plan] = plans.best_fit([plan_pieces(store, split, spec).slices], spec.block_len)
    return SampleBlocks(store, plan, spec_of(split, spec), samples, pad_id=0)


def batch_of(store, spec, samples=None):
    """All blocks as one batch."""
    samples = samples or sample_spec()
    blocks = blocks_of(store, spec, samples)
    rows = [blocks[i].only(blocks.fields) for i in range(len(blocks))]
    return jax.tree.map(jnp.asarray, stacked(rows))


# ------------------------------------------------------------------------------------------------- a sample by itself


def static_masks(number, document, longer_than=50):
    """Where the copy of a document has [MASK], as the rule says, in a loop."""
    is_masked = np.zeros(len(document.ids), bool)
    for answer, (start, length, *_) in enumerate(document.spans):
        size = length - 1
        if size > longer_than:
            draws = np.random.default_rng((SEED, number, answer)).random(size)
            is_masked[start + np.argsort(draws, kind="stable")[: max(1, int(RATIO * size))]] = True
    return is_masked


def answers_of(document, up_to=2**30):
    """Whether each token is the assistant's, in answers of so many tokens at most, their ends not counted."""
    is_answer = np.zeros(len(document.ids), bool)
    for start, length, *_ in document.spans:
        is_answer[start : start + length] = length - 1 <= up_to
    return is_answer


def masked_losses(definition, params, ids, is_masked, positions=None):
    """-log p of each token but the first, [MASK] standing in some places before it: a sequence by itself, [N - 1].

    Args:
      definition, params: of the model.
      ids: [N] clean tokens, which are the targets.
      is_masked: [N] bool, inputs that are replaced.
      positions: [N] of RoPE; default: from 0 on.
    """
    tokens = jnp.where(is_masked, MASK, ids)[None, :-1]
    visibility = causal(tokens)
    if positions is not None:
        visibility = Visibility(None, visibility.positions, rope_positions=positions[None, :-1])
    log_probs = jax.nn.log_softmax(definition.apply(params, tokens, visibility).astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, ids[None, 1:, None], axis=-1)[0, :, 0]


class Alone(NamedTuple):
    """Samples that are computed one by one; all of the same length, so that one program does it."""

    ids: jax.Array  # [S, N].
    is_answer: jax.Array  # [S, N], in the clean part.
    is_masked: jax.Array  # [S, N], in the copy.
    positions: jax.Array  # [S, N], of RoPE.
    is_short: jax.Array  # [S, N], of answers without masks, in the clean part.

    @property
    def has_copy(self):
        """[S]"""
        return self.is_masked.any(axis=1)

    def losses(self, definition, params, masks):
        """The summed losses of [S] answers, masked tokens and short answers; `masks` are put into the inputs or not."""

        def one(sample):
            losses = masked_losses(definition, params, sample.ids, sample.is_masked & masks, sample.positions)
            return tuple((losses * x[1:]).sum() for x in (sample.is_answer, sample.is_masked, sample.is_short))

        return jax.lax.map(one, self)


def samples_alone(documents):
    """Samples by themselves; their masked copies are sequences of their own."""
    rows = [
        (own.ids, answers_of(own), static_masks(number, own), range(len(own.ids)), answers_of(own, up_to=50))
        for number, own in enumerate(documents)
    ]
    return Alone(*(jnp.array([list(x) for x in column]) for column in zip(*rows, strict=True)))


def samples_in_one_sequence(documents, restarts):
    """The paper's sequences: prompt, clean answer, masked answer; all of one length."""
    rows = []
    for number, own in enumerate(documents):
        n, tail = len(own.ids), own.spans[0].start
        is_masked, is_answer, no = static_masks(number, own), answers_of(own), np.zeros(n - tail, bool)
        positions = [*range(n), *(range(tail, n) if restarts else range(n, 2 * n - tail))]
        of_copy = np.concatenate([np.zeros(n, bool), is_masked[tail:]])
        is_short = np.concatenate([answers_of(own, up_to=50), no])
        rows.append(([*own.ids, *own.ids[tail:]], np.concatenate([is_answer, no]), of_copy, positions, is_short))
    return Alone(*(jnp.array([list(x) for x in column]) for column in zip(*rows, strict=True)))
