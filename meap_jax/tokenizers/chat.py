"""Chat templates: how a conversation becomes text, by programs in Jinja that run in a sandbox."""

import datetime
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from meap_jax.errors import ConfigError, DataError
from meap_jax.fields import TEMPLATES
from meap_jax.tokenizers import sandbox
from meap_jax.tokenizers.interface import SECRET

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}, and what a template may know.

_FOLDER = Path(__file__).with_name("templates")
_OWN = "tokenizer"  # Names the template that a tokenizer brings.
_MAX_TEXT = 10_000_000  # Characters that a template may write, besides ten times those of the messages, ...
_MAX_MADE = 20_000_000  # ... characters of texts that it may make on the way, besides a hundred times those, ...
_MAX_STEPS = 200_000  # ... and turns of loops, and calls, besides a thousand a message.
_FAILURES = (
    TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError, RecursionError, SyntaxError,
)  # fmt: skip
# Llama 3.1's own date for machines without a clock. Prepared data must not depend on the day on which it was made.
_DAY = datetime.datetime(2024, 7, 26)


def template_source(name_or_path: str, own: str) -> str:
    """The Jinja source of the template that `sft.template` names.

    Args:
      name_or_path: llama3, vicuna, alpaca, chatml, tokenizer, or the path of a .jinja file.
      own: the template that the tokenizer brings, which `tokenizer` names; "" if it brings none.

    Raises:
      ConfigError: there is no such template or file, or it is no Jinja.
    """
    place = _FOLDER / f"{name_or_path}.jinja" if name_or_path in TEMPLATES else Path(name_or_path).expanduser()
    if name_or_path not in TEMPLATES and place.suffix != ".jinja":
        raise _refusal(name_or_path, f"must be one of {', '.join(TEMPLATES)}, or the path of a .jinja file")
    if name_or_path == _OWN and not own:
        words = ", ".join(word for word in TEMPLATES if word != _OWN)
        raise _refusal(name_or_path, f"the tokenizer brings no template of its own: name {words} or a .jinja file")
    try:
        source = own if name_or_path == _OWN else place.read_text(encoding="utf-8")
        _compile(source)
    except OSError as error:
        raise _refusal(name_or_path, f"that file can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _refusal(name_or_path, f"that file is not UTF-8 (byte {error.start})") from error
    except jinja2.TemplateSyntaxError as error:
        raise _refusal(name_or_path, f"line {error.lineno} of it is no Jinja: {error.message}") from error
    except (jinja2.TemplateError, *_FAILURES) as error:
        raise _refusal(name_or_path, f"it can't be compiled ({type(error).__name__}: {error})") from error
    return source


def _refusal(template: str, problem: str) -> ConfigError:
    return ConfigError(f"sft.template is {template!r}, but {problem}.")


def render(
    template: str,
    messages: Sequence[Message],
    names: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    now: datetime.datetime | None = None,
) -> str:
    """The text of a conversation; by default up to where the assistant's next words begin.

    Templates find the variables, functions and options that transformers documents for them. They can neither reach
    files nor Python's internals, and what they write has a limit.

    Args:
      template: in Jinja.
      messages: {"role": ..., "content": ...} each.
      names: of special tokens, {"bos_token": "<s>", ...}.
      add_generation_prompt: whether the text ends where the assistant's next words begin.
      now: what a template takes for the time; default: the time it is.

    Raises:
      DataError: the template is no Jinja, does what the sandbox forbids, refuses the messages or doesn't end.
    """
    values: dict[str, Any] = dict(messages=list(messages), tools=None, documents=None)
    values["add_generation_prompt"] = add_generation_prompt
    values["strftime_now"] = lambda form: (now or datetime.datetime.now()).strftime(form)
    said = sum(len(text) for message in messages for text in message.values())
    limit, size = _MAX_TEXT + 10 * said, 0
    pieces: list[str] = []
    try:
        with sandbox.budget(characters=_MAX_MADE + 100 * said, steps=_MAX_STEPS + 1_000 * len(messages)):
            for piece in _compile(template).generate(**values, **names):
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise DataError(f"the chat template writes more than {limit:,} characters for these messages.")
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template can't render these messages: {_on_a_line(error)}.") from error
    except _FAILURES as error:  # In what the template computes.
        raise DataError(f"the chat template fails ({type(error).__name__}: {_on_a_line(error)}).") from error
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = sandbox.Sandbox()
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _on_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def prompts_and_answers(
    template: str, messages: Sequence[Message], names: Mapping[str, str], specials: re.Pattern[str]
) -> Iterator[tuple[str, str]]:
    """The rendered text in pieces, two for each message of the assistant: what comes in front of it, and the answer.

    An answer begins where the text for the messages before it ends, at inference too, and ends with the first special
    token behind its words. What a template writes behind that, such as a newline, is in front of the next answer.

    Args:
      template: in Jinja.
      messages: the conversation; what looks like a special token in them is broken up.
      names: of special tokens, {"bos_token": "<s>", ...}.
      specials: finds special tokens.

    Raises:
      DataError: as `render`, and where the text of a conversation does not begin with that of its first messages, or
        no special token ends an answer.
    """
    written = ""  # Up to the end of the answer before.
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(template, messages[:i], names, now=_DAY)
        text = render(template, messages[: i + 1], names, add_generation_prompt=False, now=_DAY)
        if not prompt.startswith(written):
            raise DataError("the chat template writes earlier turns anew when others follow: set sft.turns to each.")
        if not text.startswith(prompt):
            raise DataError(
                "the chat template writes no answer behind the prompt for it: what it writes with "
                "add_generation_prompt is not the beginning of what it writes with the answer."
            )
        answer = text[len(prompt) :]
        # Special tokens may be in front of the words too, such as the name of a channel.
        hidden = specials.sub(lambda found: SECRET * len(found[0]), answer)
        words = message["content"].strip()
        start = hidden.rfind(words) if words else -1
        behind = start + len(words) if start >= 0 else 0
        end = specials.search(answer, behind)
        if end is None:
            raise DataError(
                f"the chat template ends an answer with {answer[behind:][-40:]!r}, in which this tokenizer has no "
                "special token."
            )
        yield prompt[len(written) :], answer[: end.end()]
        written = text[: len(prompt) + end.end()]


def check_announces(
    template: str, talk: Sequence[Message], names: Mapping[str, str], specials: re.Pattern[str]
) -> None:
    """Stops a template that has words in front of an answer, but not where `add_generation_prompt` asks for them.

    A model would be trained to write them, as part of the answer.

    Args:
      template: in Jinja.
      talk: a question and its answer, of a word that the template has nowhere else.
      names: of special tokens, as of `prompts_and_answers`.
      specials: finds them.

    Raises:
      DataError: naming the words.
    """
    asked = (render(template, talk[:1], names, add_generation_prompt=is_asked, now=_DAY) for is_asked in (False, True))
    [(_, answer)] = prompts_and_answers(template, talk, names, specials)
    words = specials.sub("", answer.partition(talk[1]["content"])[0]).strip()
    if len(set(asked)) == 1 and words:
        raise DataError(
            f"the chat template writes {words!r} in front of an answer, but nothing for add_generation_prompt, so that "
            "a model would have to write that itself."
        )


def plain_markers(template: str, specials: re.Pattern[str]) -> list[str]:
    """What looks like a special token in the source of a template, but is plain text to the tokenizer."""
    return sorted({name for name in re.findall(r"<\|\w+\|>", template) if not specials.fullmatch(name)})
