"""ROUGE and the shares of an output that its source has, against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax.evals.faithfulness import ngrams_in_source, numbers_in_source, numbers_of
from meap_jax.evals.rouge import Overlap, rouge_l, rouge_n, words

WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


def test_words_are_runs_of_ascii_letters_and_digits_in_lower_case():
    # As rouge_score 0.1.2 has it: "naïve" is two words, the long s and the superscript are none.
    assert words("Don't pay $3.50 for a naïve U.S. co_op²\n") == [
        "don", "t", "pay", "3", "50", "for", "a", "na", "ve", "u", "s", "co", "op"
    ]  # fmt: skip


def test_rouge_is_what_one_counts_by_hand():
    reference, output = words("Police killed the gunman."), words("The gunman, police said, killed the cat")
    # 4 and 7 words, all 4 shared. Of 3 and 6 pairs: "killed the", "the gunman". In order: police killed the.
    assert rouge_n(output, reference, 1) == pytest.approx((4 / 4, 2 * 4 / 11))
    assert rouge_n(output, reference, 2) == pytest.approx((2 / 3, 2 * 2 / 9))
    assert rouge_l(output, reference) == pytest.approx((3 / 4, 2 * 3 / 11))


def test_a_word_counts_as_often_as_both_texts_have_it():
    assert rouge_n(words("the the the the"), words("the cat the"), 1) == pytest.approx((2 / 3, 2 * 2 / 7))


def test_texts_without_units_share_nothing():
    for output, reference in (([], ["a"]), (["a"], []), ([], [])):
        assert rouge_n(output, reference, 1) == rouge_l(output, reference) == Overlap(0.0, 0.0)
    assert rouge_n(["a"], ["a"], 2) == Overlap(0.0, 0.0)


def longest_common(a, b):
    """By trying every way, for short texts."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=7), st.lists(st.sampled_from("abc"), min_size=1, max_size=7)
)
def test_the_longest_common_subsequence_is_the_one_that_a_search_finds(a, b):
    assert rouge_l(a, b).recall * len(b) == pytest.approx(longest_common(a, b))


@given(WORDS, WORDS)
def test_order_lies_between_nothing_and_the_bag_of_words_and_f1_is_symmetric(a, b):
    assert 0 <= rouge_l(a, b).f1 <= rouge_n(a, b, 1).f1 + 1e-12 <= 1 + 2e-12
    for overlap in (rouge_l, lambda a, b: rouge_n(a, b, 1), lambda a, b: rouge_n(a, b, 2)):
        assert overlap(a, b).f1 == pytest.approx(overlap(b, a).f1)


# --------------------------------------------------------------------------------------------------------- faithfulness


def test_shares_of_distinct_ngrams_that_the_source_has():
    source = "The storm closed two schools in Bergen on Monday."
    output = "The storm closed schools. The storm closed schools."
    # All four words; of four pairs two, since closed schools and schools the are not there; of four threes one.
    assert ngrams_in_source(output, source, 1) == 1.0
    assert ngrams_in_source(output, source, 2) == 2 / 4
    assert ngrams_in_source(output, source, 3) == 1 / 4
    assert ngrams_in_source("Storm", source, 2) is None and ngrams_in_source("", source, 1) is None


def test_numbers_are_compared_without_commas_and_whole():
    assert numbers_of("1,234,567 of 2.50 and 12,3456 in B52 on 2024-05-01, not one. 9.") == {
        "1234567", "2.50", "12", "3456", "52", "2024", "05", "01", "9"
    }  # fmt: skip
    assert (
        numbers_in_source("12,000 people in 2023, 12000 in all, 120 hurt", "In 2023, 12000 fled and 1200 did not.")
        == 2 / 3
    )
    assert numbers_in_source("five people", "5 people") is None
    assert numbers_in_source("5 people", "five people") == 0.0
