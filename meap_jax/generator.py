"""Continues prompts with a model: batches of them, buckets of lengths, stops, and beginnings that are read once."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt32

from meap_jax import sharding
from meap_jax.decoding import CHUNK, Rules, State, bucket, decode, decoding_params, prefill, smallest_bucket
from meap_jax.errors import ConfigError, DataError
from meap_jax.model.decoder import Params, define
from meap_jax.models import Model, OpenModel, origin_of
from meap_jax.sampling import Sampling
from meap_jax.tokenizers import Tokenizer

GREEDY = Sampling()
TOKENS_BETWEEN_LOOKS = 16  # Where stop strings or a terminal wait for text, it is looked at after so many tokens.
_NEW_TOKENS_MULTIPLE = 64  # Room for new tokens is rounded up to it, so that fewer programs are compiled.


class Completion(NamedTuple):
    """What follows a prompt."""

    text: str  # Without what ended it.
    tokens: list[int]  # With the stop token, if one came.
    log_probs: list[float]  # Of each token under the model, in nats; empty if they were not asked for.
    stopped: bool  # By a stop token or a stop string; else by max_new_tokens.


class _Settings(NamedTuple):
    """The arguments of `Generator.generate` that hold for all of its prompts."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_strings: Sequence[str]
    log_probs: bool


class _Batch(NamedTuple):
    """Prompts on the device, read and ready to be continued."""

    num_prompts: int  # Rows behind them are padding.
    rules: Rules
    state: State


class Generator:
    """Continues prompts in batches; a program is compiled for each bucket of lengths, not for each length."""

    def __init__(
        self,
        model: Model,
        params: Params | None,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[int] = (),
        adds_bos: bool = True,
        batch_size: int = 8,
        seq_len: int | None = None,
        chunk: int = CHUNK,
    ):
        """Copies the parameters into the form that decoding reads.

        Args:
          model: what it computes, and its mesh.
          params: as `OpenModel.params`, not needed after this; None: `load` brings them.
          tokenizer: of the model.
          stops: tokens that end a text, besides the tokenizer's end of a document.
          adds_bos: whether `encode` begins a prompt with the tokenizer's begin of a document.
          batch_size: prompts at a time, at most.
          seq_len: tokens of a prompt and of what follows, at most; default: that of the config.
          chunk: tokens of a prompt that are computed at a time, rounded up to what the mesh divides.
        """
        self.model, self.tokenizer, self.adds_bos = model, tokenizer, adds_bos
        self.context_len: int = seq_len or model.config.seq_len
        self._definition = define(model.definition.config, is_stacked=False)
        convert = functools.partial(decoding_params, config=self._definition.config)
        self._convert = jax.jit(convert, out_shardings=self._definition.shardings(model.mesh))
        self._params: Params | None = None
        self.load(params)
        shape = model.mesh.shape
        self._shards, context = shape["data"] * shape["fsdp"], shape["context"]
        self._smallest = smallest_bucket(self._definition.config, context)
        self._chunk = bucket(max(chunk, self._smallest), self._smallest, 2**30)
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._stops = np.array(sorted({tokenizer.eos_id, *stops}), np.int32)
        self._never = np.arange(self._definition.config.vocab_size) >= tokenizer.num_tokens
        self._never[[tokenizer.mask_id, tokenizer.pad_id]] = True
        static, sizes = ("sampling", "with_log_probs"), ("num_new", "chunk")
        reading, decoding = (functools.partial(f, definition=self._definition) for f in (prefill, decode))
        self._prefill = jax.jit(reading, static_argnames=(*static, *sizes))
        self._decode = jax.jit(decoding, static_argnames=static, donate_argnums=1)
        self._decode_a_copy = jax.jit(decoding, static_argnames=static)
        everywhere = sharding.replicated(model.mesh)
        self._fetch = jax.jit(lambda s: (s.generated, s.log_probs, s.num_generated), out_shardings=everywhere)
        self._keys = jax.jit(_row_keys, out_shardings=sharding.batch_sharding(model.mesh))

    @classmethod
    def of(cls, opened: OpenModel, **options: Any) -> "Generator":
        """A generator of a model that `open_model` opened; what its import said of prompts holds.

        Raises:
          ConfigError: the model has no tokenizer.
        """
        if opened.tokenizer is None:
            raise ConfigError("the model has no tokenizer yet: train it first, which trains the tokenizer too.")
        origin = origin_of(opened.meta)
        known = dict(stops=origin.get("stop_ids", ()), adds_bos=origin.get("adds_bos", True))
        return cls(opened.model, opened.params, opened.tokenizer, **known | options)

    def load(self, params: Params | None) -> None:
        """Puts other parameters of the same model in place of those that are there; None gives their memory back."""
        self._params = None if params is None else self._convert(params)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt that begins a text."""
        return [self.tokenizer.bos_id] * self.adds_bos + self.tokenizer.encode(prompt)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        log_probs: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Completion]:
        """Continues prompts.

        Args:
          prompts: tokens of each.
          max_new_tokens: after each prompt, at most.
          sampling: greedy by default.
          seed: of what is drawn; what follows a prompt doesn't depend on the prompts beside it, but on its number.
          stop_strings: end a text where one of them begins.
          log_probs: asks for those of the tokens.
          on_text: is given the text of a single prompt, piece by piece, as it comes.

        Raises:
          DataError: a prompt is empty, or there is no room after it.
        """
        settings = _Settings(max_new_tokens, sampling, seed, stop_strings, log_probs)
        self._check(prompts, settings)
        completions: list[Completion | None] = [None] * len(prompts)
        # Prompts of like length share a batch.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), self._batch_size):
            numbers = order[first : first + self._batch_size]
            own = [prompts[i] for i in numbers]
            batch = self._read(own, numbers, settings, bucket(len(own), self._shards, self._batch_size))
            shown = 0
            for found in self._looks(batch, settings, often=on_text is not None):
                if on_text is not None:
                    safe = _safe(found[0], stop_strings)
                    on_text(found[0].text[shown:safe])
                    shown = max(shown, safe)
            if on_text is not None:
                on_text(found[0].text[shown:])
            for i, completion in zip(numbers, found, strict=True):
                completions[i] = completion
        return [completion for completion in completions if completion is not None]

    def generate_sharing(
        self,
        batches: Sequence[Sequence[Sequence[int]]],
        *,
        max_new_tokens: int = 128,
        stop_strings: Sequence[str] = (),
    ) -> Iterator[list[Completion]]:
        """Continues batches of prompts greedily, and reads once what their rows share with those of the first batch.

        What is shared is found by comparing tokens, and counts in chunks. It pays to give the batch that shares most
        with the others first. The cache of that one is held until the end, beside that of the one that is read.

        Args:
          batches: tokens of as many prompts each; row i of every batch should begin as row i of the first does.
          max_new_tokens, stop_strings: as in `generate`.

        Yields:
          What follows the prompts of each batch, in order.

        Raises:
          DataError: as `generate`.
        """
        settings = _Settings(max_new_tokens, GREEDY, 0, stop_strings, log_probs=False)
        self._check([prompt for batch in batches for prompt in batch], settings)
        T = max(len(prompt) for batch in batches for prompt in batch)
        numbers, before = range(len(batches[0])), None
        for prompts in batches:
            rows = -(-len(prompts) // self._shards) * self._shards
            start = 0
            if before is not None:
                start = min(_num_shared(a, b) for a, b in zip(batches[0], prompts, strict=True))
                start -= start % self._chunk
            batch = self._read(prompts, numbers, settings, rows, T, before if start else None, start)
            keeps = before is None and len(batches) > 1
            before = batch.state if keeps else before
            *_, found = self._looks(batch, settings, keeps=keeps)
            yield found

    def _check(self, prompts: Sequence[Sequence[int]], settings: _Settings) -> None:
        max_new_tokens = settings.max_new_tokens
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, but must be at least 1.")
        if any(not stop for stop in settings.stop_strings):
            raise ConfigError("a stop string is empty, but must have at least one character.")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise DataError(f"prompt {i} is empty, but must have at least one token.")
            if len(prompt) + max_new_tokens > self.context_len:
                raise DataError(
                    f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, which is more than "
                    f"the model's {self.context_len} together: shorten one of them."
                )
            if not 0 <= min(prompt) <= max(prompt) < self._definition.config.vocab_size:
                raise DataError(f"prompt {i} has a token outside the model's vocabulary of {len(self._never)}.")

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        settings: _Settings,
        rows: int,
        longest: int = 0,
        before: State | None = None,
        start: int = 0,
    ) -> _Batch:
        """Puts prompts on the device and reads them; with `before`, from token `start` on (see `prefill`)."""
        T = bucket(max(longest, *map(len, prompts)), self._smallest, self._chunk)
        tokens, lengths = np.full((rows, T), self.tokenizer.pad_id, np.int32), np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        by_row, everywhere = sharding.batch_sharding(self.model.mesh), sharding.replicated(self.model.mesh)
        row_numbers = np.resize(np.array(numbers, np.int32), rows)
        shared: dict[str, Any] = {}
        if before is not None:
            shared = dict(before=before, start=sharding.put_whole(everywhere, np.int32(start)))
        with jax.set_mesh(self.model.mesh):
            seed = sharding.put_whole(everywhere, np.uint32(settings.seed))
            rules = Rules(
                self._keys(seed, sharding.put_whole(by_row, row_numbers)),
                sharding.put_whole(everywhere, self._never),
                sharding.put_whole(everywhere, self._stops),
            )
            state: State = self._prefill(
                self._params,
                sharding.put_whole(by_row, tokens),
                sharding.put_whole(by_row, lengths),
                rules,
                sampling=settings.sampling,
                num_new=-(-settings.max_new_tokens // _NEW_TOKENS_MULTIPLE) * _NEW_TOKENS_MULTIPLE,
                chunk=self._chunk,
                with_log_probs=settings.log_probs,
                **shared,
            )
        return _Batch(len(prompts), rules, state)

    def _looks(
        self, batch: _Batch, settings: _Settings, *, often: bool = False, keeps: bool = False
    ) -> Iterator[list[Completion]]:
        """Yields what follows the prompts of a batch so far, until all of it is there; `keeps` leaves it as it is."""
        state, rows, num_prompts = batch.state, len(batch.state.token), batch.num_prompts
        tokens_a_look = TOKENS_BETWEEN_LOOKS if settings.stop_strings or often else settings.max_new_tokens
        is_done = np.arange(rows) >= num_prompts
        by_row, everywhere = sharding.batch_sharding(self.model.mesh), sharding.replicated(self.model.mesh)
        limit = 0
        while True:
            limit = min(limit + tokens_a_look, settings.max_new_tokens)
            decode = self._decode_a_copy if keeps and limit <= tokens_a_look else self._decode
            with jax.set_mesh(self.model.mesh):
                # Besides those that the device knows of: rows without a prompt, and texts that came to a stop string.
                state = state._replace(is_done=state.is_done | sharding.put_whole(by_row, is_done))
                state = decode(
                    self._params,
                    state,
                    batch.rules,
                    sharding.put_whole(everywhere, np.int32(limit)),
                    sampling=settings.sampling,
                    with_log_probs=settings.log_probs,
                )
                generated, log_probs, count = jax.device_get(self._fetch(state))
            found = [self._completion(generated[row], log_probs[row], settings) for row in range(num_prompts)]
            is_done[:num_prompts] = [completion.stopped for completion in found]
            yield found
            if is_done.all() or count >= settings.max_new_tokens:
                return

    def _completion(self, generated: np.ndarray, log_probs: np.ndarray, settings: _Settings) -> Completion:
        tokens = [int(token) for token in generated if token >= 0]
        stopped = bool(tokens) and tokens[-1] in self._stops
        text = self.tokenizer.decode(tokens[:-1] if stopped else tokens, continues=True)
        ends = [place for stop in settings.stop_strings if (place := text.find(stop)) >= 0]
        if ends:
            text, stopped = text[: min(ends)], True
        return Completion(text, tokens, log_probs[: len(tokens)].tolist() if settings.log_probs else [], stopped)


def _row_keys(seed: UInt32[Array, ""], numbers: Int32[Array, " B"]) -> UInt32[Array, "B key"]:
    """Key data of each row, from the number of its prompt."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.key_data(jax.random.fold_in(key, number)))(numbers)


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike, at least one of the second left out."""
    size = min(len(a), len(b) - 1)
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if len(differ) else size


def _safe(found: Completion, stop_strings: Sequence[str]) -> int:
    """How much of a text can be shown: no half character, and nothing that may become a stop string."""
    text = found.text
    if found.stopped:
        return len(text)
    held = len(text) - len(text.rstrip("\ufffd"))
    for stop in stop_strings:
        held = max([held, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
    return len(text) - held
