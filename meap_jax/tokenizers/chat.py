"""Renders chat templates: programs in Jinja that a model brings, run in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from meap_jax.errors import DataError


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training by transformers; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Reads the block and gives what is in it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the assistant's next words begin.

    Templates find the variables, functions and options that transformers documents for them. They can neither reach
    files nor Python's internals.

    Args:
      template: in Jinja.
      messages: {"role": ..., "content": ...} each.
      names: of special tokens, {"bos_token": "<s>", ...}.

    Raises:
      DataError: the template is no Jinja, does what the sandbox forbids, or refuses the messages.
    """
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return sandbox.from_string(template).render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **names
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the tokenizer's chat template can't render these messages: {error}.") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # In what the template computes.
        raise DataError(f"the tokenizer's chat template fails ({type(error).__name__}: {error}).") from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
