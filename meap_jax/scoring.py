"""Log-probabilities of continuations: requests that share a context are packed, so that it is read once.

A row holds groups side by side, each a segment: a context as trunk (branch 0) and behind it a branch for each of its
continuations, which sees the trunk and itself. Positions go on from the context's in every branch, so that what a
branch gets is what it would get alone (`meap_jax.model.visibility`).
"""

import bisect
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from meap_jax import sharding
from meap_jax.decoding import bucket
from meap_jax.errors import DataError
from meap_jax.model.decoder import Definition, Params, context_shards
from meap_jax.model.visibility import Visibility
from meap_jax.models import Model

_SHORTEST_ROW = 256  # Tokens; shorter groups share a row.
_POSITIONS_AT_ONCE = 32  # Of a row whose logits exist at a time.

Request = tuple[Sequence[int], Sequence[int]]  # Context and continuation; each has at least one token.


class Score(NamedTuple):
    """What a model says of a continuation."""

    log_prob: float  # The sum over its tokens, in nats.
    is_greedy: bool  # Whether each of its tokens is the most likely one.


def left_truncated(request: Request, seq_len: int) -> Request | None:
    """A request whose tokens but the last fit into `seq_len`: the left end of a longer one's context is cut off.

    Returns:
      None where no token of the context would be left.
    """
    context, continuation = request
    extra = max(len(context) + len(continuation) - (seq_len + 1), 0)
    return (context[extra:], continuation) if extra < len(context) else None


class _Group(NamedTuple):
    """A context, and the numbers of the requests that continue it."""

    context: tuple[int, ...]
    requests: list[int]
    size: int  # Tokens in a row.


class _Packed(NamedTuple):
    """A batch of rows, and where the answers to its requests are."""

    tokens: np.ndarray  # [B, T] int32.
    visibility: Visibility  # Of numpy arrays [B, T] int32.
    at: np.ndarray  # [B, N] int32: positions whose next token is asked for; unused ones are 0.
    targets: np.ndarray  # [B, N] int32: those tokens.
    requests: list[tuple[int, int, int, int]]  # (request, row, first, stop): its places in `at`.


class Scorer:
    """Scores requests in batches; a program is compiled for each bucket of lengths."""

    def __init__(self, model: Model, *, batch_size: int = 8, seq_len: int | None = None):
        """Prepares the program.

        Args:
          model: what it computes, and its mesh.
          batch_size: rows at a time, rounded up to what the mesh divides.
          seq_len: tokens of a context and its continuation at most, without the last; default: that of the config.
        """
        self.model, self.seq_len = model, seq_len or model.config.seq_len
        shape = model.mesh.shape
        shards = shape["data"] * shape["fsdp"]
        self._batch_size = -(-batch_size // shards) * shards
        self._smallest = (128 if model.definition.config.attention == "splash" else 16) * 2 * shape["context"]
        step = functools.partial(_score, definition=model.definition)
        self._step = jax.jit(step, out_shardings=sharding.replicated(model.mesh))

    def score(self, params: Params, requests: Sequence[Request]) -> Iterator[tuple[list[int], list[Score]]]:
        """Yields (numbers of requests, their scores) batch by batch, the longest first.

        Args:
          params: as `OpenModel.params`.
          requests: of `seq_len` + 1 tokens at most.

        Raises:
          DataError: a request is longer, or has an empty part.
        """
        for i, (context, continuation) in enumerate(requests):
            size = len(context) + len(continuation)
            if not len(context) or not len(continuation) or size > self.seq_len + 1:
                raise DataError(
                    f"request {i} has {len(context)} tokens and {len(continuation)} that continue them, but each must "
                    f"have at least one, and both together at most {self.seq_len + 1}."
                )
        by_row = sharding.batch_sharding(self.model.mesh)
        for packed in self._packed(requests):
            arrays = jax.tree.map(functools.partial(sharding.put_whole, by_row), packed[:4])
            with jax.set_mesh(self.model.mesh):
                log_probs, is_likeliest = jax.device_get(self._step(params, *arrays))
            yield (
                [i for i, *_ in packed.requests],
                [
                    Score(float(log_probs[row, a:b].astype(np.float64).sum()), bool(is_likeliest[row, a:b].all()))
                    for _, row, a, b in packed.requests
                ],
            )

    def _packed(self, requests: Sequence[Request]) -> Iterator[_Packed]:
        """Groups requests by context, and packs groups into batches of rows, the longest first."""
        waiting = sorted(_groups(requests, self.seq_len), key=lambda group: group.size)
        sizes = [group.size for group in waiting]
        while waiting:
            T = bucket(max(sizes[-1], min(_SHORTEST_ROW, self.seq_len)), self._smallest, 2**30)
            rows: list[list[_Group]] = [[] for _ in range(self._batch_size)]
            for row in rows:
                free = T
                while number := bisect.bisect_right(sizes, free):  # The largest that fits is the last of so many.
                    row.append(waiting.pop(number - 1))
                    free -= sizes.pop(number - 1)
            yield _laid_out(rows, requests, T)


def _groups(requests: Sequence[Request], most: int) -> list[_Group]:
    """Requests by context; one whose continuations come to more than `most` tokens is divided."""
    by_context = defaultdict(list)
    for i, (context, _) in enumerate(requests):
        by_context[tuple(context)].append(i)
    groups = []
    for context, numbers in by_context.items():
        own, size = list[int](), len(context)
        for i in numbers:
            added = len(requests[i][1]) - 1
            if own and size + added > most:
                groups.append(_Group(context, own, size))
                own, size = [], len(context)
            own, size = [*own, i], size + added
        groups.append(_Group(context, own, size))
    return groups


def _laid_out(rows: Sequence[Sequence[_Group]], requests: Sequence[Request], T: int) -> _Packed:
    """The arrays of a batch; tokens that pad a row are a segment of their own."""
    B = len(rows)
    tokens, segments, positions, branches = (np.zeros((B, T), np.int32) for _ in range(4))
    positions[:] = np.arange(T)
    at: list[list[int]] = [[] for _ in rows]
    targets: list[list[int]] = [[] for _ in rows]
    places = []
    for row, groups in enumerate(rows):
        start = 0
        for segment, (context, numbers, size) in enumerate(groups, start=1):
            n = len(context)
            segments[row, start : start + size] = segment
            tokens[row, start : start + n], positions[row, start : start + n] = context, np.arange(n)
            end = start + n
            for branch, i in enumerate(numbers, start=1):
                continuation = requests[i][1]
                m = len(continuation) - 1  # The last token is a target alone.
                tokens[row, end : end + m], branches[row, end : end + m] = continuation[:-1], branch
                positions[row, end : end + m] = np.arange(n, n + m)
                places.append((i, row, len(at[row]), len(at[row]) + m + 1))
                at[row] += [start + n - 1, *range(end, end + m)]
                targets[row] += list(continuation)
                end += m
            start += size
        positions[row, start:] = np.arange(T - start)
    N = bucket(max(map(len, at)), _POSITIONS_AT_ONCE, 2**30)
    at_BN, targets_BN = (np.array([[*own, *[0] * (N - len(own))] for own in x], np.int32) for x in (at, targets))
    visibility: Any = Visibility(segments, positions, branch_ids=branches)  # type: ignore[arg-type]  # Of NumPy's.
    return _Packed(tokens, visibility, at_BN, targets_BN, places)


def _score(
    params: Params,
    tokens: Int32[Array, "B T"],
    visibility: Visibility,
    at: Int32[Array, "B N"],
    targets: Int32[Array, "B N"],
    *,
    definition: Definition,
) -> tuple[Float32[Array, "B N"], Bool[Array, "B N"]]:
    """Of the token after each of the positions `at`: its log-probability, and whether it is the most likely."""
    decoder, num_tokens = definition.decoder(params), definition.config.num_tokens
    x_BTD = sharding.unzigzag(decoder.hidden(tokens, visibility), context_shards())
    B, N = at.shape

    def some(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at, targets = chunk
        logits = decoder.logits(x_BTD, at).astype(jnp.float32)
        if num_tokens:  # Rows from there on are padding that no probability goes to.
            logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    chunks = tuple(x.reshape(B, -1, _POSITIONS_AT_ONCE).swapaxes(0, 1) for x in (at, targets))
    log_probs, is_likeliest = jax.lax.map(some, chunks)
    return log_probs.swapaxes(0, 1).reshape(B, N), is_likeliest.swapaxes(0, 1).reshape(B, N)
