"""Contexts have the length and the sentences that are asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_settings
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.haystack import filled, largest_that_fits, make_haystack, open_haystack, read_prompt
from tokenizer_kinds import kind

TEXT = " ".join(f"Sentence number {i} says {i * i}." for i in range(200))


def haystack(longest=400, text=TEXT):
    return make_haystack(text, kind("bpe"), longest)


@pytest.mark.parametrize("num_tokens", [30, 200, 399])
def test_a_context_has_about_so_many_tokens_and_whole_sentences(num_tokens):
    for trial in range(5):
        context = haystack().context(trial, 5, num_tokens)
        assert num_tokens - 30 < len(kind("bpe").encode(context.text)) <= num_tokens + 2
        assert context.text.lstrip().startswith("Sentence number") and context.text.rstrip().endswith(".")
        assert context.ends[0] == 0 and context.ends[-1] == len(context.text)


def test_trials_begin_at_different_places_and_a_short_text_is_repeated():
    starts = {haystack().context(trial, 5, 100).text[:30] for trial in range(5)}
    assert len(starts) == 5
    short = haystack(longest=3_000, text="One. Two. Three.")
    assert len(kind("bpe").encode(short.context(0, 1, 3_000).text)) > 2_900


def test_sentences_go_in_at_their_share_of_the_tokens_in_order():
    context = haystack().context(0, 1, 390)
    for depth in (0, 25, 50, 75, 100):
        text = context.with_sentences([("NEEDLE.", depth / 100)])
        before, after = text.split("NEEDLE.")
        share = len(kind("bpe").encode(before)) / len(kind("bpe").encode(before + after))
        assert depth / 100 - 0.05 < share <= depth / 100 + 0.01
        assert not before.strip() or before.rstrip().endswith(".")
        assert (before + after).replace(" ", "").split() == context.text.replace(" ", "").split()
    text = context.with_sentences([("FIRST.", 0.5), ("SECOND.", 0.5), ("ZERO.", 0.0)])
    assert text.index("ZERO.") < text.index("FIRST.") < text.index("SECOND.")


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 60), st.integers(0, 500))
def test_the_largest_number_whose_count_fits(limit, per_item, fixed, guess):
    def count(n):
        return fixed + per_item * n + n % 3 * (per_item > 4)

    expected = max((n for n in range(400) if count(n) <= limit), default=-1)
    assert largest_that_fits(count, limit, guess) == expected


def test_prompts_keep_braces_that_are_no_names(tmp_path):
    assert filled('{"a": {key}} {other}', key="k") == '{"a": k} {other}'
    assert filled("{a}", a="{b}", b="x") == "{b}"  # What is put in is not read again.
    (tmp_path / "p").write_text("{context} only")
    with pytest.raises(ConfigError, match=r"eval.niah.prompt is .*p, which has no \{question\}"):
        read_prompt(str(tmp_path / "p"), "", ("context", "question"), "eval.niah.prompt")
    with pytest.raises(ConfigError, match="can't be read"):
        read_prompt(str(tmp_path / "q"), "", (), "eval.niah.prompt")


def test_text_comes_from_files_or_from_pythons_documentation(tmp_path):
    (tmp_path / "a.txt").write_text("Only this is said. " * 50)
    own = open_haystack(tiny_settings.setting(niah__haystack=str(tmp_path)), 100, 2)
    assert own.context(1, 2, 90).text.startswith("Only this")
    assert open_haystack(tiny_settings.setting(), 1_000, 2).size > 10_000
    (tmp_path / "b.txt").write_text("Something else. " * 500)
    assert open_haystack(tiny_settings.setting(niah__haystack=str(tmp_path)), 100, 2).version != own.version
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match="eval.niah.haystack is .*, which holds no text"):
        open_haystack(tiny_settings.setting(niah__haystack=str(tmp_path)), 100, 2)
