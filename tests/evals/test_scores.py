"""Scoring rules on values worked out by hand from what their sources do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax.evals import scores
from meap_jax.evals.scores import (
    best_subspan_em,
    contains,
    effective_length,
    exact_match,
    first_line,
    rouge1_recall,
    squad_normalized,
    string_match_all,
    string_match_part,
    word_share,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, the HAT!", "cat hat"),
        ("an apple a day", "apple day"),
        ("theatre another", "theatre another"),  # Articles are whole words.
        ("U.S.A.", "usa"),  # Punctuation leaves nothing behind, not a blank.
        ("well-known", "wellknown"),
        ("  two \t\n words  ", "two words"),
        ("Röntgen’s “quote”", "röntgen’s “quote”"),  # Of punctuation ASCII's alone goes.
        ("the", ""),
        ("a-the b", "athe b"),  # Punctuation goes before articles.
        ("", ""),
    ],
)
def test_squad_normalization(text, expected):
    assert squad_normalized(text) == expected


@pytest.mark.parametrize(
    ("output", "golds", "expected"),
    [
        (" Wilhelm Conrad Röntgen, of Germany.", ["Wilhelm Conrad Röntgen"], 1),
        ("It was wilhelm conrad röntgen", ["Curie", "Wilhelm Conrad Röntgen"], 1),
        ("Nobody knows\nWilhelm Conrad Röntgen", ["Wilhelm Conrad Röntgen"], 0),  # Behind the first line.
        ("\nWilhelm Conrad Röntgen", ["Wilhelm Conrad Röntgen"], 0),  # Its first line is empty.
        ("", ["x"], 0),
        ("May 18 2018", ["May 18, 2018"], 1),
        ("18", ["May 18, 2018"], 0),
        ("catalog", ["cat"], 1),  # A part of a word counts too.
        ("anything", ["The"], 1),  # A gold that normalizes to nothing is part of everything, as upstream.
    ],
)
def test_best_subspan_em(output, golds, expected):
    assert best_subspan_em(output, golds) == expected


def test_first_line_is_what_stands_before_the_first_newline():
    assert [first_line(x) for x in ("a \nb", "\na", "a", "", "a\rb")] == ["a", "", "a", "", "a\rb"]


@pytest.mark.parametrize(
    ("output", "golds", "all_of", "any_of"),
    [
        ("The numbers are 12 and 34.", ["12", "34"], 1, 1),
        ("The number is 12.", ["12", "34"], 0.5, 1),
        ("none", ["12", "34"], 0, 0),
        ("", ["12"], 0, 0),
        ("FALCON", ["falcon"], 1, 1),
        ("1234", ["12", "34", "56"], 2 / 3, 1),
        ("a\x00b", ["a\nb"], 1, 1),  # Control characters are newlines.
        ("a\tb", ["a\tb"], 0, 0),  # A tab is one of them.
        ("Ünïcode", ["ünï"], 1, 1),
    ],
)
def test_rulers_string_matches(output, golds, all_of, any_of):
    assert string_match_all(output, golds) == pytest.approx(all_of)
    assert string_match_part(output, golds) == any_of


def test_rouge1_recall_counts_distinct_words_as_the_papers_cells_do():
    gold = "eat a sandwich and sit in Dolores Park on a sunny day."  # 12 words, 11 of them distinct.
    assert rouge1_recall("Eat a sandwich, and SIT in Dolores Park on a sunny day!", gold) == 1
    assert rouge1_recall("on and on it went", gold) == pytest.approx(2 / 11)
    assert rouge1_recall("a", gold) == pytest.approx(1 / 11) and rouge1_recall("", gold) == 0
    assert rouge1_recall("sandwiches", gold) == 0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("eat noodles and read.", 1),
        (" Eat the noodles, and read. The best thing", 1),  # Articles and case; behind the sentence nothing counts.
        ("\neat noodles and read\nmore", 1),
        ("eat noodles and read and sleep.", 0),
        ("to eat noodles and read.", 0),
        ("", 0),
    ],
)
def test_exact_match_of_the_first_sentence(output, expected):
    assert exact_match(output, "eat noodles and read.") == expected


def test_word_share_is_opencompass_score_over_100():
    assert word_share("It was DORBRA jor.", "Dorbra jor") == 1
    assert word_share("dorbra", "Dorbra jor jor") == pytest.approx(1 / 3)  # A word that comes twice counts twice.
    assert word_share("the tower", "tow x") == 0.5  # Parts of words count.
    assert word_share("a b.", "b. a,") == 0.5  # Punctuation belongs to a word.


def test_contains_looks_at_the_whole_output_in_any_case():
    assert contains("x\nABC-1", "abc-1") == 1 and contains("", "a") == 0


def test_effective_length_ends_at_the_first_length_that_loses_too_much():
    assert effective_length({1000: 0.8, 2000: 0.7, 4000: 0.69, 8000: 0.5}) == 4000  # 0.85 of 0.8 is 0.68.
    assert effective_length({1000: 0.8, 2000: 0.5, 4000: 0.8}) == 1000  # Later ones don't count.
    assert effective_length({1000: 0.0, 2000: 0.0}) == 0
    assert effective_length({2000: 1.0, 1000: 1.0}) == 2000


@given(st.text(), st.text(min_size=1))
def test_scores_are_shares_and_an_output_that_is_the_gold_has_all(output, gold):
    for rule in (string_match_all, string_match_part, best_subspan_em):
        assert 0 <= rule(output, [gold]) <= 1
    assert contains(gold, gold) == 1
    if scores._WORD.search(gold.lower()):
        assert rouge1_recall(gold, gold) == 1
    if gold.split():
        assert word_share(gold, gold) == 1
