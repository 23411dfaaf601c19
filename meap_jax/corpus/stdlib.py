"""Real English that every CPython carries: its language reference and its docstrings."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Third-party code, tests and their data, and packages that newer Pythons dropped or may drop.
_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test idlelib lib2to3 lib-dynload ensurepip __pycache__".split()
)
_SHORTEST = 100  # characters; below it docstrings are mostly "Return the name." and the like
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_stdlib() -> list[str]:
    """Reads the running Python's documentation, about 1.9 million characters.

    The documents are the topics of the language reference (`pydoc_data.topics`) and, one a module,
    the docstrings of the standard library. Sources are read with `ast` and never imported or
    executed. The text differs between Python versions; the order is that of sorted paths.

    Returns:
      One string a topic and one a module; no text or docstring comes twice.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = [*_topics(root / "pydoc_data" / "topics.py"), *_modules(root)]
    return list(dict.fromkeys(texts))


def _topics(path: Path) -> list[str]:
    """The values of the one dictionary in pydoc_data/topics.py; none where a distro left it out."""
    tree = _parse(path)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [_clean(topics[name]) for name in sorted(topics)]
    return []


def _modules(root: Path) -> list[str]:
    """One text a module below `root`: its docstrings that are long enough and new."""
    texts: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            tree = _parse(Path(folder, name)) if name.endswith(".py") else None
            docstrings = []
            for docstring in _docstrings(tree) if tree else []:
                if len(docstring) >= _SHORTEST and docstring not in seen:
                    seen.add(docstring)
                    docstrings.append(docstring)
            if docstrings:
                texts.append("\n\n".join(docstrings))
    return texts


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # a dangling link, a template that isn't Python


def _docstrings(node: ast.AST) -> Iterator[str]:
    """All docstrings below a module or statement, in the order of the source."""
    if isinstance(node, _DOCUMENTED):
        # get_docstring removes the indentation as inspect.cleandoc does.
        if docstring := ast.get_docstring(node):
            yield _clean(docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):  # no expression holds a docstring
            yield from _docstrings(child)


def _clean(text: str) -> str:
    """Without outer blank space, and without the lone surrogates that UTF-8 cannot hold."""
    return text.strip().encode("utf-8", "replace").decode("utf-8")
