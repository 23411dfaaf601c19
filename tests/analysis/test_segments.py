"""Segments are found in tokens, and scores are what they are said to be."""

import json

import numpy as np
import pytest

from meap_jax.analysis.segments import EXAMPLES, PAPER, SEGMENTS, VIEWS, Example, encode, scores
from meap_jax.analysis.shares import differences, read_examples
from meap_jax.errors import DataError
from tokenizer_kinds import kind

EXAMPLE = Example("rivers", before="The sky is wide.", answer=" It is blue.", after=" So.", query=" What? ", eos="")


@pytest.mark.parametrize("name", ["bpe", "mistral", "llama"])
def test_tokens_are_of_the_segment_that_holds_their_last_character(name):
    tokenizer = kind(name)
    behind = Example("spaces behind", before="The sky is wide. ", answer="It is blue. ", after="So. ", query="What?")
    for example in (EXAMPLE, *EXAMPLES, EXAMPLE._replace(eos=" End."), behind):
        ids, of = encode(example, tokenizer)
        assert len(ids) == len(of) and of == sorted(of) and set(of) == set(range(5))
        assert ids[0] == tokenizer.bos_id and of[0] == 0
        text = "".join(example[1:])
        assert tokenizer.decode(ids[1:] if example.eos else ids[1:-1]).strip() == text.strip()
        if not example.eos:
            assert ids[-1] == tokenizer.eos_id and of.count(4) == 1
        [(_, offsets)] = tokenizer.encode_with_offsets([text])
        for place, segment in zip(offsets[:, 1], of[1:], strict=False):
            lengths = np.cumsum([len(part) for part in example[1:]])
            assert place - 1 < lengths[segment] and (segment == 0 or place - 1 >= lengths[segment - 1])


def test_an_example_without_a_token_in_a_segment_is_refused():
    with pytest.raises(DataError, match="'rivers' has no token of its own in 'after'"):
        encode(EXAMPLE._replace(after=""), kind("bpe"))
    with pytest.raises(DataError, match="in 'before'"):
        encode(EXAMPLE._replace(before=""), kind("bpe"))  # The begin of document alone.


def test_scores_are_means_a_token_divided_by_their_sum():
    of = [0, 0, 1, 2, 2, 3, 4]
    sums = np.broadcast_to([0.5, 0.1, 0.2, 0.1, 0.1], (2, len(VIEWS), 5))
    found = scores(sums, of)
    np.testing.assert_allclose(found["sum"][0, 0], [0.5, 0.1, 0.2, 0.1, 0.1])
    # Two tokens before and two after: means are .25, .1, .1, .1, .1; without the first there is one before: .5.
    np.testing.assert_allclose(found["mean"][0, 0], np.array([0.25, 0.1, 0.1, 0.1, 0.1]) / 0.65)
    np.testing.assert_allclose(found["mean"][1, 0], np.array([0.5, 0.1, 0.1, 0.1, 0.1]) / 0.9)


def test_the_papers_shares_sum_to_1_but_for_the_table_with_the_copy_error():
    assert [example.name for example in EXAMPLES] == list(PAPER)
    for name, paper in PAPER.items():
        for objective, total in (("meap", 1.034), ("ntp", 1.060)):
            expected = total if name == "Great Wall" else 1.0
            assert sum(paper[objective]) == pytest.approx(expected, abs=0.0101 if name == "Eiffel Tower" else 0.0011)


def test_models_are_compared_segment_by_segment_over_examples():
    def of(shift):
        shares = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
        by_example = {
            name: shares + np.array([-shift, shift, 0, 0, 0]) * (1 + number) for number, name in enumerate("ab")
        }
        views = {name: {view: {"all": own.tolist()} for view in VIEWS} for name, own in by_example.items()}
        return {
            name: {score: {first: own for first in ("with", "without")} for score in ("mean", "sum")}
            for name, own in views.items()
        }

    found = differences({"first": of(0.0), "other": of(0.02)})
    assert len(found) == 2 * 2 * len(SEGMENTS)
    by_segment = {record["segment"]: record for record in found[: len(SEGMENTS)]}
    assert by_segment["answer"]["difference"]["estimate"] == pytest.approx(0.03)
    assert by_segment["answer"]["t"] == pytest.approx(3) and by_segment["before"]["t"] == pytest.approx(-3)
    assert by_segment["answer"]["p_holm"] == pytest.approx(1.0)  # p is .20, and there are ten rows.


GOOD = {name: name for name in SEGMENTS}


@pytest.mark.parametrize(
    "lines, said",
    [
        ([GOOD, {**GOOD, "answer": None}], "line 2: the field 'answer' is not a string"),
        ([{name: "text" for name in SEGMENTS[:-1]}], "line 1: the field 'eos' is missing"),
        ([{**GOOD, "name": "a"}, {**GOOD, "name": "a"}], "line 2: the name 'a' comes twice"),
        (["before, answer"], "line 1 is no object, but str"),
        ([], "holds nothing"),
    ],
)
def test_examples_that_cannot_be_are_said_with_file_and_line(tmp_path, lines, said):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=f"mine.jsonl, (which )?{said}"):
        read_examples(str(file))


def test_examples_are_read_in_order_and_named_by_their_lines_or_names(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in (GOOD, {**GOOD, "name": "own", "eos": ""})) + "\n\n")
    assert read_examples(str(file)) == [Example("line 1", *SEGMENTS), Example("own", *SEGMENTS[:-1], "")]
    file.write_text("{")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_examples(str(file))
    with pytest.raises(DataError, match="nowhere.jsonl, which can't be read"):
        read_examples("nowhere.jsonl")
