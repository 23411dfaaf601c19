"""Jinja for templates that strangers wrote: no files, no way into Python, and bounds on time and memory.

Jinja's own sandbox keeps a template from files and from Python's internals. What it does not keep it from is
`'a' * 10**9`, a text that doubles in each turn of a loop, or loops in loops. Here every step that makes a text or a
list longer is paid from a budget of characters, and every turn of a loop and every call from one of steps.
"""

import contextlib
import contextvars
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, visitor

_LARGEST_INTEGER = 10_000  # Bits.
_ELEMENT = 16  # Characters that an element of a list counts for.
# What they make may be far longer than what they are given, or is random, and no chat template needs them.
_LEFT_OUT = ("center", "batch", "slice", "wordwrap", "format", "urlize", "random", "pprint", "xmlattr")
_WIDENING = ("ljust", "rjust", "center", "zfill", "expandtabs")
# A width or precision of a thousand or more, or one that is given, in a conversion of `%` and in a field of `format`.
_WIDTHS = {
    "%": re.compile(r"%(\([^)]*\))?[-+ #0]*(\d{4,}|\*|\d*\.(\d{4,}|\*))"),
    "{": re.compile(r"\{[^}]*(\d{4,}|\{)"),
}


class BudgetError(jinja2.TemplateError):
    """A template that wants more than its budget."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self, characters: int, steps: int):
        self.limits = {"characters": characters, "steps": steps}
        self.left = dict(self.limits)

    def spend(self, kind: str, amount: int) -> None:
        self.left[kind] -= amount
        if self.left[kind] < 0:
            raise BudgetError(f"it takes more than {self.limits[kind]:,} {kind}")


_SMALL = (1_000_000, 10_000)  # For what Jinja computes when it compiles.
_budget: contextvars.ContextVar[_Budget | None] = contextvars.ContextVar("budget", default=None)


@contextlib.contextmanager
def budget(characters: int, steps: int) -> Iterator[None]:
    """Lets templates that are rendered inside use so much, all of them together.

    Args:
      characters: of texts that are made; an element of a list counts for some too.
      steps: turns of loops, and calls.
    """
    token = _budget.set(_Budget(characters, steps))
    try:
        yield
    finally:
        _budget.reset(token)


def _spend(kind: str, amount: int) -> None:
    (_budget.get() or _Budget(*_SMALL)).spend(kind, amount)


def _room() -> int:
    return (_budget.get() or _Budget(*_SMALL)).left["characters"]


def _size(value: Any, most: int) -> int:
    """About the characters of a value as text; no more than a little above `most` is counted."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if not isinstance(value, list | tuple | set | dict):
        return 20
    size = 2
    for element in value.items() if isinstance(value, dict) else value:
        size += _ELEMENT + _size(element, most - size)
        if size > most:
            break
    return size


def _paid(value: Any) -> Any:
    """The value, once what it is long has been paid."""
    if isinstance(value, str | bytes | list | tuple | dict):
        _spend("characters", _length(value))
    return value


def _length(value: Any) -> int:
    """What a text or a list costs by itself."""
    return len(value) * (1 if isinstance(value, str | bytes) else _ELEMENT)


def _check(size: int) -> None:
    """Stops before something is made that there is no room for."""
    if size > (room := _room()):
        _spend("characters", room + 1)


def _checked(value: Any) -> Any:
    """The value, if its text has room."""
    _check(_size(value, _room()))
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values of a loop, each of which is a step."""
    for value in values:
        _spend("steps", 1)
        yield value


def _joined(first: Any, *others: Any) -> str:
    return _paid("".join(str(_checked(value)) for value in (first, *others)))


def _check_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stops a method of a text whose result has no room."""
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return
    if name in _WIDENING:
        widths = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        _check(max(widths, default=0) * (1 + text.count("\t")))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str):
        _check(len(text) + text.count(args[0]) * len(str(args[1])))
    elif name == "join" and args and isinstance(args[0], list | tuple | set | dict):
        _check(_size(args[0], _room()) + len(text) * len(args[0]))


def _check_format(form: str, mark: str, values: Any) -> None:
    if _WIDTHS[mark].search(form):
        raise BudgetError("it has a format with a width of a thousand or more, or with one that is given")
    _check(len(form) + form.count(mark) * _size(values, _room()))


class _Bounds(visitor.NodeTransformer):
    """Puts the turns of loops and the concatenations of a template behind functions that count."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        """Counts turns."""
        self.generic_visit(node, *args, **kwargs)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem, *args: Any, **kwargs: Any) -> nodes.Node:
        """Counts characters of slices, which Jinja takes without asking its environment."""
        self.generic_visit(node, *args, **kwargs)
        is_slice = isinstance(node.arg, nodes.Slice)
        return nodes.Filter(node, "_paid", [], [], None, None, lineno=node.lineno) if is_slice else node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        """Counts characters."""
        self.generic_visit(node, *args, **kwargs)
        first, *others = node.nodes
        return nodes.Filter(first, "_joined", others, [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training by transformers; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Reads the block and gives what is in it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What chat templates run in: the options and filters of transformers, and a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        """Makes an environment without a loader: there is nothing to include or import."""
        extensions = [jinja2.ext.loopcontrols, _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_checked)
        del self.globals["lipsum"]
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters |= {name: _priced(name, function) for name, function in self.filters.items()}
        self.filters |= {"_counted": _counted, "_joined": _joined, "_paid": _paid}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method of a template."""
        _spend("steps", 1)
        _check_call(function, args, kwargs)
        return _paid(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """The method `format` of a text, without a way into its values and to large widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", (args, kwargs))
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes."""
        sized, integers = str | bytes | list | tuple, isinstance(left, int) and isinstance(right, int)
        if operator == "*" and not integers:
            for some, times in ((left, right), (right, left)):
                if isinstance(some, sized) and isinstance(times, int):
                    _check(_length(some) * times)
        elif operator in ("*", "**") and integers:
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _LARGEST_INTEGER:
                raise BudgetError(f"it computes a number of more than {_LARGEST_INTEGER:,} bits")
        elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            _check(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, "%", right)
        return _paid(super().call_binop(context, operator, left, right))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of transformers, with its options."""
    indent = None if indent is None else min(int(indent), 16)
    if any(len(separator) > 16 for separator in separators or ()):
        raise BudgetError("it writes JSON with separators of more than 16 characters")
    return json.dumps(
        _checked(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _priced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, whose input must have room for what it may become, and whose result is paid."""

    @functools.wraps(function)  # With the mark that says what Jinja gives it besides.
    def priced(*args: Any, **kwargs: Any) -> Any:
        if name == "join":  # What comes one by one has to be measured.
            args = tuple(list(_counted(value)) if isinstance(value, range | Iterator) else value for value in args)
        values = (*args, *kwargs.values())
        texts = [value for value in values if isinstance(value, str)]
        longest = max(map(len, texts), default=0)
        if name == "replace" and len(texts) > 2:
            _check(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
        elif name == "indent" and texts:
            widths = [value for value in values if isinstance(value, int)]
            _check(len(texts[0]) + (1 + texts[0].count("\n")) * max([*widths, *map(len, texts[1:]), 4]))
        else:
            lists = [value for value in values if isinstance(value, list | tuple | dict)]
            between = longest * max(map(len, lists), default=0) if name == "join" else 0
            _check(sum(_size(value, _room()) for value in (*texts, *lists)) + between)
        return _paid(function(*args, **kwargs))

    return priced
