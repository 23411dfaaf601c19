"""What the soak makes of its samples."""

import pytest

from experiments.benchmarks.soak import Sample, last_step, slope, verdict, windows

LEAK = 2_000  # Bytes a step.


def samples(num_steps, leak=LEAK):
    # The process closes its files when it has ended its last step.
    return [
        Sample(s, 500_000_000, 400_000_000 + leak * s, 3 if s == num_steps else 40, 100, 0, 60 * s, 80 * s)
        for s in range(0, num_steps + 1, 10)
    ]


def test_memory_that_grows_is_told_in_megabytes_a_thousand_steps():
    assert slope(samples(1_000)) == pytest.approx(2)
    assert slope(samples(1_000, leak=0)) == pytest.approx(0, abs=1e-9)


def test_the_verdict_counts_neither_warm_up_nor_the_end():
    seconds = {step: 1.0 if step < 50 else 0.1 * (1 + (step > 750)) for step in range(10, 1_001, 10)}
    found = verdict(samples(1_000), seconds, 1_000)
    assert found["allocated, MB a 1,000 steps"] == pytest.approx(2)
    assert found["step p50, last quarter / first"] == pytest.approx(2)
    assert found["open files, most / least"] == "40 / 40"
    assert found["metrics.jsonl, bytes a record"] == 600


def test_windows_share_the_steps_and_leave_out_what_was_not_sampled():
    seconds = {step: 0.1 for step in range(10, 1_001, 10)}
    rows = windows([s for s in samples(1_000) if not 100 < s.step <= 200], seconds, 1_000)
    assert [row["steps"] for row in rows] == ["1 to 100", *(f"{i}01 to {i + 1}00" for i in range(2, 9)), "901 to 1,000"]
    assert rows[0]["step p50, ms"] == pytest.approx(100)


def test_the_last_record_is_found_behind_a_torn_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}}}\n' for i in range(2_000)) + '{"step": 9')
    assert last_step(file) == 1_999
    file.write_text('{"st')
    with pytest.raises(IndexError):
        last_step(file)
