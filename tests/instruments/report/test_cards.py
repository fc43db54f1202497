import math

import numpy as np

from r3hf_ray.instruments.report.cards import (
    HEAD,
    TAIL,
    answer_text,
    in_order,
    notes_of,
    number,
    panel,
    scale_of,
    shown,
)


def test_a_long_answer_is_shown_from_both_ends() -> None:
    count = HEAD + TAIL + 50
    text = answer_text([str(i) for i in range(count)], range(count), [0.5] * count, start=-1.0)
    row = panel("uniform", "", np.full(count, 0.5), scale=1.0)
    assert text["id"] == [*range(HEAD), *range(count - TAIL, count)]
    assert (text["gap"], text["more"]) == (HEAD, 50)
    lengths = {len(text[name]) for name in ("text", "id", "curve", "marks", "words", "tags")} | {len(row["values"])}
    assert lengths == {HEAD + TAIL}
    assert row["total"] == 0.5 * count  # of the whole answer


def test_a_short_answer_is_shown_whole() -> None:
    for count in (0, 1, HEAD, HEAD + 1, HEAD + TAIL):
        assert shown(list(range(count))) == list(range(count)) and shown(np.arange(count)) == list(range(count))
        assert answer_text(["a"] * count, [1] * count, [0.0] * count, start=0.0)["more"] == 0


def test_a_row_has_a_sum_where_that_means_something() -> None:
    assert panel("r3hf", "", [0.1] * 10, scale=1.0)["total"] == 1.0
    assert panel("logprob", "", [0.1] * 10, scale=1.0, summed=False)["total"] is None
    assert panel("marks", "", None, scale=1.0)["values"] is panel("marks", "", None, scale=1.0)["total"] is None


def test_numbers_are_json() -> None:
    assert [number(x) for x in (math.nan, math.inf, None, 1 / 3, -123456.0)] == [None, None, None, 0.3333, -123500.0]


def test_methods_are_told_once_and_in_order() -> None:
    assert in_order(["mine", "terminal", "r3hf"]) == ["r3hf", "terminal", "mine"]
    rows = [panel(name, f"what {name} does", [1.0], scale=1.0) for name in ("r3hf", "terminal", "r3hf")]
    assert notes_of([{"panels": rows[:2]}, {"panels": rows[2:]}]) == {
        "r3hf": "what r3hf does",
        "terminal": "what terminal does",
    }


def test_full_colour_is_not_set_by_one_outlier_nor_by_zeros() -> None:
    usual = np.linspace(0.01, 1.0, 100)
    assert scale_of([np.append(usual, 50.0)]) < 1.0
    assert scale_of([usual, np.zeros(10_000)]) == scale_of([usual])
    assert scale_of([]) == scale_of([np.zeros(3)]) == 1.0
