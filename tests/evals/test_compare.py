"""Comparisons of evaluations whose differences are known."""

import json

import numpy as np
import pytest

from meap_jax import evaluate
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.compare import compare, compare_runs, markdown
from meap_jax.statistics import holm, mcnemar, paired_bootstrap, paired_t_interval, t_test


def mdqa(hits, kind="file_20"):
    """Records of a question a row and a position a column."""
    return [
        {"prompt": f"{q}{p}", "question": q, "kind": kind, "position": 1 + p, "golds": ["x"], "output": str(hit),
         "scores": {"best_subspan_em": float(hit)}}
        for q, row in enumerate(hits)
        for p, hit in enumerate(row)
    ]  # fmt: skip


RNG = np.random.default_rng(0)
A, B = RNG.random((60, 2)) < 0.4, RNG.random((60, 2)) < 0.6


def results(**examples):
    return {"metrics": {}, "examples": examples}


def test_rows_are_the_means_of_both_their_difference_and_its_tests():
    rows = {row.name: row for row in compare(results(mdqa=mdqa(A)), results(mdqa=mdqa(B)))["mdqa"]}
    first = rows["mdqa/file_20/best_subspan_em/position_1"]
    difference = B[:, 0].astype(float) - A[:, 0]
    assert (first.a, first.b, first.num_units) == (A[:, 0].mean(), B[:, 0].mean(), 60)
    assert first.difference == pytest.approx(paired_bootstrap(difference))
    assert first.p == mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
    both = rows["mdqa/file_20/best_subspan_em"]  # A question at both positions is one unit.
    assert both.num_units == 60 and both.p == t_test((B.astype(float) - A).mean(axis=1)).p
    assert both.holm is None
    second = rows["mdqa/file_20/best_subspan_em/position_2"]
    assert [first.holm, second.holm] == pytest.approx(holm([first.p, second.p]))


def test_examples_are_paired_by_what_is_known_of_them_and_not_by_their_order():
    shuffled = [mdqa(B)[i] for i in RNG.permutation(120)][:100]
    [row, *_] = compare(results(mdqa=mdqa(A)), results(mdqa=shuffled))["mdqa"]
    expected = {(r["question"], r["position"]): r["scores"]["best_subspan_em"] for r in shuffled}
    assert row.b == pytest.approx(np.mean(list(expected.values())))
    assert row.a == pytest.approx(np.mean([A[q, p - 1] for q, p in expected]))
    assert (
        compare(results(mdqa=mdqa(A)), results(mdqa=mdqa(B, "drawn_20"))) == {}
    )  # Other contexts are other questions.
    assert compare(results(mdqa=mdqa(A)), results(kv=mdqa(B))) == {}


def test_groups_are_in_the_order_of_their_numbers():
    records = [
        {"length": length, "depth": depth, "trial": t, "scores": {"s": float(t)}}
        for length in (1000, 900) for depth in (100, 0, 50) for t in range(2)
    ]  # fmt: skip
    names = [row.name for row in compare(results(niah=records), results(niah=records))["niah"]]
    groups = ["depth_0", "depth_50", "depth_100", "length_900", "length_1000"]
    assert names[:6] == ["niah/s", *(f"niah/s/{group}" for group in groups)]
    assert names[6:8] == ["niah/s/length_900/depth_0", "niah/s/length_900/depth_50"]


def test_examples_that_were_not_asked_or_have_no_score_are_left_out():
    records = mdqa(B)
    del records[0]["scores"]
    records[1]["scores"] = {"best_subspan_em": None}
    first = compare(results(mdqa=mdqa(A)), results(mdqa=records))["mdqa"][0]
    assert first.a == pytest.approx(A.reshape(-1)[2:].mean())


def test_harness_tasks_are_groups_named_as_their_metrics():
    def records(values):
        return [{"task": f"t{i % 2}", "doc_id": i, "acc": float(v)} for i, v in enumerate(values)]

    found = compare(results(commonsense=records([1, 0, 1, 0])), results(commonsense=records([1, 1, 0, 1])))[
        "commonsense"
    ]
    assert {row.name: (row.a, row.b) for row in found} == {
        "commonsense/acc": (0.5, 0.75), "commonsense/t0/acc": (1.0, 0.5), "commonsense/t1/acc": (0.0, 1.0)
    }  # fmt: skip


def runs(values):
    return [{"metrics": {"niah/rouge1_recall": {"estimate": v, "low": 0, "high": 1}}, "examples": {}} for v in values]


def test_pairs_of_runs_are_the_units_where_there_are_several():
    [row] = compare_runs(runs([0.5, 0.6, 0.4]), runs([0.7, 0.7, 0.6]))["niah"]
    differences = np.array([0.2, 0.1, 0.2])
    assert row.num_units == 3 and row.p == pytest.approx(t_test(differences).p)
    assert row.difference == pytest.approx(paired_t_interval(differences))
    page = markdown({"niah": [row]}, ["ntp", "meap"], is_of_runs=True)
    assert "3 pairs have 2 degrees of freedom" in page and "how the two kinds of runs differ" in page


def test_chance_is_not_compared_and_older_evaluations_pair_with_those_that_count_facts():
    def evaluation(hits, **known):
        metrics = {
            "retrieval_answers/accuracy": {"estimate": np.mean(hits)},
            "retrieval_answers/chance": {"estimate": 0.2},
        }
        records = [{"row": row, "correct": hit, "depth": 0.5, "distance": 9, **known} for row, hit in enumerate(hits)]
        return {"metrics": metrics, "examples": {"retrieval_answers": records}}

    a, b = evaluation([0, 0, 1]), evaluation([1, 1, 1], num_facts=5)
    [row, *_] = compare(a, b)["retrieval_answers"]
    assert (row.num_units, row.a, row.b) == (3, pytest.approx(1 / 3), 1)
    assert [row.name for row in compare_runs([a, a], [b, b])["retrieval_answers"]] == ["retrieval_answers/accuracy"]


def test_the_papers_figures_stand_beside_their_metrics_and_never_beside_drawn_contexts():
    of_file = markdown(compare(results(mdqa=mdqa(A)), results(mdqa=mdqa(B))), ["a", "b"], is_of_runs=False)
    assert "| paper: NTP | MEAP | where |" in of_file and "| 0.243 | 0.332 | Table 8, Llama-3-8B |" in of_file
    assert "these two models alone" in of_file
    drawn = compare(results(mdqa=mdqa(A, "drawn_20")), results(mdqa=mdqa(B, "drawn_20")))
    assert "Table 8" not in markdown(drawn, ["a", "b"], is_of_runs=False)


def test_the_command_writes_a_page_and_pictures(tmp_path, capsys):
    def write(name, hits):
        metrics = {f"mdqa/file_20/best_subspan_em/position_{p + 1}":
                   {"estimate": hits[:, p].mean(), "low": None, "high": None} for p in range(2)}  # fmt: skip
        (tmp_path / name).write_text(json.dumps({"metrics": metrics, "examples": {"mdqa": mdqa(hits)}}))
        return str(tmp_path / name)

    a, b = write("ntp.json", A), write("meap.json", B)
    evaluate.command(["evaluate", "compare", a, b])
    folder = tmp_path / "meap-against-ntp"
    page = (folder / "comparison.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip() and page.startswith("# meap against ntp")
    assert (folder / "mdqa_file_20_best_subspan_em_position.png").read_bytes().startswith(b"\x89PNG")
    for words, error, expected in [
        ([a, str(tmp_path / "none.json")], ConfigError, "none.json can't be read"),
        ([f"{a},{a}", b], ConfigError, "2 evaluations against 1"),
        ([a, str(tmp_path / "bad.json")], DataError, "bad.json is no evaluation"),
    ]:
        (tmp_path / "bad.json").write_text("{}")
        with pytest.raises(error, match=expected):
            evaluate.command(["evaluate", "compare", *words])
