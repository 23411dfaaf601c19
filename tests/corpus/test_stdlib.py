"""The standard library's documentation as text."""

import pydoc_data.topics
import sys

import pytest

from meap_jax.corpus import stdlib


@pytest.fixture(scope="module")
def texts():
    return stdlib.read_stdlib()


def test_it_is_more_than_a_million_characters_of_different_texts(texts):
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and text for text in texts)


def test_it_holds_the_language_reference_and_module_docstrings(texts):
    assert pydoc_data.topics.topics["for"].strip() in texts
    everything = "\n".join(texts)
    assert "Collapse and truncate the given text to fit in the given width." in everything


def test_reading_imports_no_module(texts):
    before = set(sys.modules)
    stdlib._topics(stdlib.Path(pydoc_data.topics.__file__))
    assert "antigravity" not in sys.modules
    assert set(sys.modules) == before


def _folder(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".py").write_text(content)
    return tmp_path


def test_docstrings_come_in_the_order_of_the_source_without_indentation(tmp_path):
    long = ("word " * 30).strip()
    root = _folder(
        tmp_path,
        a=f'"""Module {long}"""\nclass A:\n    """Class {long}\n\n    Indented.\n    """\n'
        f'    def f(self):\n        """Short."""\n        if True:\n'
        f'            async def g():\n                """Inner {long}"""\n'
        f'raise SystemExit("modules are never run")\n',
    )
    assert stdlib._modules(root) == [f"Module {long}\n\nClass {long}\n\nIndented.\n\nInner {long}"]


def test_repeated_docstrings_tests_and_broken_files_are_left_out(tmp_path):
    doc = f'"""{"once " * 30}"""'
    root = _folder(tmp_path, b=doc, a=doc, c="def broken(:", test__d=doc.replace("once", "test"))
    assert stdlib._modules(root) == [("once " * 30).strip()]


def test_half_a_surrogate_pair_becomes_a_question_mark():
    assert stdlib._clean(" a\udc80b ") == "a?b"
