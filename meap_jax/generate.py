"""Continues texts with a model.

python -m meap_jax.generate --workdir=DIR --prompt="..." [--max_new_tokens=128] [--temperature=0 --top_k=0 --top_p=1]
    [--seed=0] [--stop="..."] [--step=N] [--mesh=data=-1]
python -m meap_jax.generate --workdir=DIR --chat [--prompt="..."]

DIR is the workdir of a run, or what `python -m meap_jax.convert import` wrote. The text alone goes to stdout, as it
comes. --json prints an object for each prompt in its place, with tokens and log-probabilities. --chat puts the prompt
into the model's chat template; without a prompt it asks for one after another, until an empty line.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.generator import Generator
from meap_jax.models import open_model
from meap_jax.paths import absolute
from meap_jax.sampling import Sampling


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
