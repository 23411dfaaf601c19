"""Continues texts with a model.

python -m meap_jax.generate --workdir=DIR --prompt="..." [--max_new_tokens=128] [--temperature=0 --top_k=0 --top_p=1]
    [--seed=0] [--stop="..."] [--step=N] [--mesh=data=-1]
python -m meap_jax.generate --workdir=DIR --chat [--prompt="..."]

DIR is the workdir of a run, or what `python -m meap_jax.convert import` wrote. The text alone goes to stdout, as it
comes. --json prints an object for each prompt in its place, with tokens and log-probabilities. --chat puts the prompt
into the model's chat template; without a prompt it asks for one after another, until an empty line.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Int32, UInt32

from meap_jax import cli, sharding
from meap_jax.decoding import CHUNK, Rules, State, bucket, decode, decoding_params, prefill, smallest_bucket
from meap_jax.errors import ConfigError, DataError
from meap_jax.model.decoder import Params, define
from meap_jax.models import Model, OpenModel, open_model
from meap_jax.paths import absolute
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


class Generator:
    """Continues prompts in batches; a program is compiled for each bucket of lengths, not for each length."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[int] = (),
        adds_bos: bool = True,
        batch_size: int = 8,
        chunk: int = CHUNK,
    ):
        """Copies the parameters into the form that decoding reads.

        Args:
          model: with `seq_len` of its config as the longest text.
          params: as `OpenModel.params`; not needed after this.
          tokenizer: of the model.
          stops: tokens that end a text, besides the tokenizer's end of a document.
          adds_bos: whether `encode` begins a prompt with the tokenizer's begin of a document.
          batch_size: prompts at a time, at most.
          chunk: tokens of a prompt that are computed at a time, rounded up to what the mesh divides.
        """
        self.model, self.tokenizer, self.adds_bos = model, tokenizer, adds_bos
        self.context_len: int = model.config.seq_len
        self._definition = define(model.definition.config, is_stacked=False)
        convert = functools.partial(decoding_params, config=self._definition.config)
        self._params = jax.jit(convert, out_shardings=self._definition.shardings(model.mesh))(params)
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
        imported = opened.meta.get("imported", {})
        known = dict(stops=imported.get("stop_ids", ()), adds_bos=imported.get("adds_bos", True))
        return cls(opened.model, opened.params, opened.tokenizer, **known | options)

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
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            tokens_a_look = TOKENS_BETWEEN_LOOKS if stop_strings or on_text else max_new_tokens
            shown = 0
            for found in self._looks([prompts[i] for i in batch], batch, settings, tokens_a_look):
                if on_text is not None:
                    safe = _safe(found[0], stop_strings)
                    on_text(found[0].text[shown:safe])
                    shown = max(shown, safe)
            if on_text is not None:
                on_text(found[0].text[shown:])
            for i, completion in zip(batch, found, strict=True):
                completions[i] = completion
        return [completion for completion in completions if completion is not None]

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

    def _looks(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], settings: _Settings, tokens_a_look: int
    ) -> Iterator[list[Completion]]:
        """Yields what follows the prompts of a batch so far, until all of it is there."""
        rows = bucket(len(prompts), self._shards, self._batch_size)
        T = bucket(max(map(len, prompts)), self._smallest, self._chunk)
        tokens, lengths = np.full((rows, T), self.tokenizer.pad_id, np.int32), np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        is_done = np.arange(rows) >= len(prompts)
        by_row, everywhere = sharding.batch_sharding(self.model.mesh), sharding.replicated(self.model.mesh)
        row_numbers = np.resize(np.array(numbers, np.int32), rows)
        program: dict[str, Any] = dict(sampling=settings.sampling, with_log_probs=settings.log_probs)
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
                num_new=-(-settings.max_new_tokens // _NEW_TOKENS_MULTIPLE) * _NEW_TOKENS_MULTIPLE,
                chunk=self._chunk,
                **program,
            )
            limit = 0
            while True:
                limit = min(limit + tokens_a_look, settings.max_new_tokens)
                # Besides those that the device knows of: rows without a prompt, and texts that came to a stop string.
                state = state._replace(is_done=state.is_done | sharding.put_whole(by_row, is_done))
                limit_on_device = sharding.put_whole(everywhere, np.int32(limit))
                state = self._decode(self._params, state, rules, limit_on_device, **program)
                generated, log_probs, count = jax.device_get(self._fetch(state))
                found = [self._completion(generated[row], log_probs[row], settings) for row in range(len(prompts))]
                is_done[: len(prompts)] = [completion.stopped for completion in found]
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


def _safe(found: Completion, stop_strings: Sequence[str]) -> int:
    """How much of a text can be shown: no half character, and nothing that may become a stop string."""
    text = found.text
    if found.stopped:
        return len(text)
    held = len(text) - len(text.rstrip("\ufffd"))
    for stop in stop_strings:
        held = max([held, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
    return len(text) - held


# ------------------------------------------------------------------------------------------------------------- command


def command(argv: list[str]) -> None:
    """Continues the prompt of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m meap_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a run, or of an imported model")
    parser.add_argument("--prompt", action="append", help="what is continued; several with --json")
    parser.add_argument("--chat", action="store_true", help="puts the prompt into the model's chat template")
    parser.add_argument("--system", help="with --chat: the message of the system")
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens that follow at most; default: 128, or what room is left"
    )
    parser.add_argument("--temperature", type=float, help="default: 0, greedy; 1 with --top_k or --top_p")
    parser.add_argument("--top_k", type=int, default=0, help="the most likely tokens that are drawn from; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="the probability that those must come to")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--stop", action="append", default=[], help="ends the text where it begins; may be repeated")
    parser.add_argument("--json", action="store_true", help="an object a prompt: text, tokens, log_probs, stopped")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--mesh", default="", help="axis=size,...: in place of those axes of the config's mesh")
    args = parser.parse_args(argv[1:])
    prompts = args.prompt or []
    if not args.chat and not prompts:
        raise ConfigError("--prompt is not set: give the text to continue, such as --prompt='Once upon a time'.")
    if len(prompts) > 1 and not args.json:
        raise ConfigError(f"--prompt is given {len(prompts)} times, but without --json there is one text only.")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed is {args.seed}, but must be in [0, 2^32).")
    temperature = float(args.top_k > 0 or args.top_p < 1) if args.temperature is None else args.temperature
    sampling = Sampling(temperature, args.top_k, args.top_p)
    generator = Generator.of(open_model(absolute(epath.Path(args.workdir)), args.step, cli.parse_mesh(args.mesh)))
    settings: dict[str, Any] = dict(sampling=sampling, seed=args.seed, stop_strings=args.stop)

    def room(tokens: list[list[int]]) -> int:
        left = generator.context_len - max(map(len, tokens))
        return max(1, min(128, left)) if args.max_new_tokens is None else args.max_new_tokens

    def show(text: str) -> None:
        if jax.process_index() == 0:
            print(text, end="", flush=True)

    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.chat and not prompts:
        _converse(generator, system, settings, room, show)
        return
    if args.chat:
        tokens = [generator.tokenizer.encode_chat([*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    else:
        tokens = [generator.encode(prompt) if prompt else [] for prompt in prompts]
    if args.json:
        for prompt, found in zip(
            prompts, generator.generate(tokens, log_probs=True, max_new_tokens=room(tokens), **settings), strict=True
        ):
            show(json.dumps({"prompt": prompt, **found._asdict()}, ensure_ascii=False) + "\n")
    else:
        generator.generate(tokens, on_text=show, max_new_tokens=room(tokens), **settings)
        show("\n")


def _converse(
    generator: Generator,
    messages: list[dict[str, str]],
    settings: dict[str, Any],
    room: Callable[[list[list[int]]], int],
    show: Callable[[str], None],
) -> None:
    """Takes turns with whoever writes to stdin, until an empty line."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages = [*messages, {"role": "user", "content": line}]
        tokens = [generator.tokenizer.encode_chat(messages)]
        [found] = generator.generate(tokens, on_text=show, max_new_tokens=room(tokens), **settings)
        show("\n")
        messages = [*messages, {"role": "assistant", "content": found.text}]


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
