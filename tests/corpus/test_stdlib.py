"""The standard library's documentation as text."""

import pydoc_data.topics

from meap_jax.corpus import stdlib


def test_it_is_more_than_a_million_characters_of_the_language_reference_and_module_docstrings():
    texts = stdlib.read_stdlib()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and text for text in texts)
    assert pydoc_data.topics.topics["for"].strip() in texts
    assert any("Collapse and truncate the given text to fit in the given width." in text for text in texts)


def test_docstrings_come_once_in_the_order_of_the_source_and_without_indentation(tmp_path):
    long, once = ("word " * 30).strip(), f'"""{"once " * 30} half a surrogate pair: \\udc80"""'
    a = (
        f'"""Module {long}"""\nclass A:\n    """Class {long}\n\n    Indented.\n    """\n'
        f'    def f(self):\n        """Short."""\n        if True:\n'
        f'            async def g():\n                """Inner {long}"""\n'
        f'raise SystemExit("modules are never run")\n'
    )
    (tmp_path / "test").mkdir()
    files = {"a": a, "b": once, "c": once, "d": "def broken(:", "test/e": f'"""Of a test {long}"""'}
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    module = f"Module {long}\n\nClass {long}\n\nIndented.\n\nInner {long}"
    assert stdlib._modules(tmp_path) == [module, once.strip('"').replace("\\udc80", "?")]
