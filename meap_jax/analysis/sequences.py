"""The rows that models are shown: texts as tokens, and the gaps in them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32

from meap_jax import sharding
from meap_jax.corpus.stdlib import read_stdlib
from meap_jax.errors import ConfigError, DataError
from meap_jax.masking import mask_tokens
from meap_jax.readers import Skips, open_corpus
from meap_jax.tokenizers import Tokenizer

SHORTEST = 16  # Tokens; a query needs keys of both kinds, with and without the first token.
TOKENS_A_DEVICE = 4_096  # In a batch, unless one row is longer.
_MAX_SKIPPED = 1_000  # Bad records of files, as data.max_skipped of a config.


def texts_of(path: str | None) -> Iterator[str]:
    """Texts in order: of files (see `readers.open_corpus`), or without a path the English that CPython carries.

    Raises:
      ConfigError, DataError: a path at which no text can be read.
    """
    if path is None:
        yield from read_stdlib()
        return
    try:
        corpus, skips = open_corpus(path), Skips(_MAX_SKIPPED)
        for part in corpus.parts():
            yield from corpus.read(part, skips)
    except (ConfigError, DataError) as error:
        raise type(error)(f"--text: {error}") from error


def cut_sequences(
    texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, num_sequences: int
) -> Int32[np.ndarray, "S T"]:
    """Rows of a begin of document and the next T - 1 tokens of one stream: texts, with an end and a begin between them.

    Args:
      texts: read until there are enough; no token comes twice.
      tokenizer: gives the ids.
      seq_len: T.
      num_sequences: S.

    Raises:
      DataError: the texts are too short for so many.
    """
    stream: list[int] = []
    wanted = num_sequences * (seq_len - 1)
    for text in texts:
        stream += [*tokenizer.encode(text), tokenizer.eos_id, tokenizer.bos_id]
        if len(stream) >= wanted:
            break
    found = len(stream) // (seq_len - 1)
    if found < num_sequences:
        raise DataError(
            f"the texts give {found:,} sequences of {seq_len:,} tokens, but {num_sequences:,} are asked for: name more "
            "text with --text, or ask for fewer with --num_sequences."
        )
    bodies = np.array(stream[:wanted], np.int32).reshape(num_sequences, seq_len - 1)
    return np.insert(bodies, 0, tokenizer.bos_id, axis=1)


def draw_masks(
    tokens: Int32[np.ndarray, "S T"], mask_ratio: float, mask_id: int, seed: int
) -> tuple[Int32[np.ndarray, "S T"], Bool[np.ndarray, "S T"]]:
    """Rows with [MASK] in a share of their positions, as MEAP's inputs, and the gaps.

    The first token never is one, so that no gap is an attention sink; nor is the last, as in the official code.

    Raises:
      ConfigError: a ratio that is not in (0, 1).
    """
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"--mask_ratio is {mask_ratio:g}, but must be in (0, 1).")
    ids = jnp.asarray(tokens)
    eligible = jnp.broadcast_to(jnp.arange(ids.shape[1]) > 0, ids.shape)
    masked, gaps = mask_tokens(jax.random.key(seed), ids, mask_ratio, mask_id=mask_id, eligible=eligible)
    return np.asarray(masked), np.asarray(gaps)


def in_batches(program: Callable[..., Any], mesh: Mesh, *arrays: np.ndarray) -> Any:
    """Runs a program on rows, some at a time, split over the mesh.

    Args:
      program: of arrays [B, T]; gives a pytree of arrays [L, B, ...] that are whole on every device.
      mesh: whose axes data and fsdp the rows of a batch are split over.
      arrays: [N, T] each.

    Returns:
      The pytree with numpy arrays [N, L, ...].
    """
    num, length = arrays[0].shape
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    size = shards * min(max(1, TOKENS_A_DEVICE // length), -(-num // shards))
    found = []
    for start in range(0, num, size):
        own = [array[start : start + size] for array in arrays]
        whole = [np.pad(array, ((0, size - len(array)), (0, 0))) for array in own]
        placed = [sharding.put_whole(sharding.batch_sharding(mesh), array) for array in whole]
        found.append(jax.tree.map(lambda x: np.moveaxis(x, 1, 0), jax.device_get(program(*placed))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num], *found)
