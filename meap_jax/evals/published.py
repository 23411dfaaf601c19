"""The paper's own figures for what evaluations here measure, by the names of our metrics.

Read from its tables and figures; Figures 3 and 4 are digitised (0.3 points). They are of models that the paper
trained, in settings that it leaves partly open.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """What the paper has for one metric."""

    where: str
    ntp: float
    meap: float


_COMMONSENSE = ("arc_challenge", "arc_easy", "boolq", "piqa", "hellaswag", "winogrande", "openbookqa")
_NTP_T1, _MEAP_T1 = (22.9, 55.7, 53.3, 73.6, 44.1, 55.0, 23.2), (25.4, 56.4, 59.5, 72.3, 43.4, 55.3, 22.6)
_LENGTHS_F4 = range(8_000, 33_000, 4_000)
_NTP_F4, _MEAP_F4 = (58.0, 43.4, 43.1, 37.6, 35.0, 28.1, 31.1), (65.4, 54.3, 47.8, 46.2, 34.6, 38.2, 36.0)
_POSITIONS = (1, 5, 10, 15, 20)
_NTP_T8, _MEAP_T8 = (24.29, 22.82, 24.11, 25.46, 31.11), (33.22, 34.16, 36.01, 36.91, 46.33)
_GRID_F3 = [(length, depth) for length in range(4_000, 33_000, 4_000) for depth in range(0, 101, 10)]
_ALL = (1.0, 1.0)  # NTP and MEAP, in all cells of Figure 3 but these: {(length, depth): (NTP, MEAP)}.
_CELLS_F3 = {
    **{(24_000, depth): (0.09, 1.0) for depth in (10, 20, 30, 40)},
    **{(28_000, depth): (0.09, 1.0) for depth in (10, 20)},
    (28_000, 30): (0.09, 0.18), (28_000, 40): (0.27, 1.0), (28_000, 50): (0.64, 1.0),
    (32_000, 0): (0.55, 1.0), (32_000, 10): (0.09, 1.0), (32_000, 20): (0.09, 1.0), (32_000, 30): (0.09, 0.27),
    (32_000, 40): (0.27, 1.0),
}  # fmt: skip


def _percent(where: str, ntp: float, meap: float) -> Published:
    return Published(where, ntp / 100, meap / 100)


PUBLISHED: dict[str, Published] = {
    "niah/rouge1_recall": _percent("Table 2, 1.1B, 200B tokens", 87.1, 98.2),
    **{
        f"niah/rouge1_recall/length_{cell[0]}/depth_{cell[1]}": Published("Figure 3", *_CELLS_F3.get(cell, _ALL))
        for cell in _GRID_F3
    },
    **{
        f"mneedle/word_share/length_{length}": _percent("Figure 4, 1.1B", ntp, meap)
        for length, ntp, meap in zip(_LENGTHS_F4, _NTP_F4, _MEAP_F4, strict=True)
    },
    **{
        f"mdqa/file_20/best_subspan_em/position_{position}": _percent("Table 8, Llama-3-8B", ntp, meap)
        for position, ntp, meap in zip(_POSITIONS, _NTP_T8, _MEAP_T8, strict=True)
    },
    "mdqa/oracle/best_subspan_em": Published("Table 9, mask ratio 0.15", 0.52, 0.58),
    **{
        f"commonsense/{task}/acc": _percent("Table 1, 1.1B", ntp, meap)
        for task, ntp, meap in zip(_COMMONSENSE, _NTP_T1, _MEAP_T1, strict=True)
    },
    # The printed NTP average, 46.2, is not the mean of its row.
    "commonsense/mean/acc": _percent("Table 1, means of its rows", 46.83, 47.84),
    **{
        f"summaries_{name}/judged": Published("Table 4, judge DeepSeek-V3", ntp, meap)
        for name, ntp, meap in (("xsum", 0.09, 0.13), ("multinews", 0.17, 0.19), ("wikisum", 0.24, 0.33))
    },
}  # fmt: skip
