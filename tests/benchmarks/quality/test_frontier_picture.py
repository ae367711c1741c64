from benchmarks.quality.frontier_picture import curve, dense

ROWS = [
    "| dense | 3 | 0.8 | 0.5 | 0.5 | 100.0% | **1.75** (1.7 to 1.8) | +0.00% | 7.8 |",
    "| dense, active size | 3 | 0.3 | 0.25 | 0.25 | 100.0% | **1.85** (1.8 to 1.9) | +3% | 2.1 |",
    "| loss at an active share of | 12% | 20% | all |",
    "| DS-MoE, weak MI, threshold |  | at 19.5%: **1.8** | **1.7** |",
]


def test_what_is_drawn_stands_in_the_table() -> None:
    assert dense(ROWS, "dense") == (0.5, 1.75)
    assert dense(ROWS, "dense, active size") == (0.25, 1.85)
    assert curve(ROWS, "weak") == [(19.5, 1.8), (100.0, 1.7)]
