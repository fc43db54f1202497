import numpy as np

from r3hf_ray.instruments.pages.coloured_answers import (
    HEAD,
    TAIL,
    AnswerText,
    ColouredAnswer,
    ColourRow,
    drawn,
    in_order,
    known_credit_row,
    notes_of,
    scale_of,
    shown,
    spread_out,
)


def drawn_of(count: int) -> tuple[dict, dict]:
    """An answer of so many tokens, as its text and its only row are drawn."""
    text = AnswerText(text=[str(i) for i in range(count)], id=range(count), curve=[0.5] * count, start=-1.0)
    row = ColourRow("uniform", "", np.full(count, 0.5), scale=1.0)
    found = drawn(ColouredAnswer(label="", facts=[], prompt="", texts=[text], rows=[row]))
    return found["texts"][0], found["rows"][0]


def test_a_long_answer_is_shown_from_both_ends() -> None:
    count = HEAD + TAIL + 50
    text, row = drawn_of(count)
    assert text["id"] == [*range(HEAD), *range(count - TAIL, count)]
    assert (text["gap"], text["more"]) == (HEAD, 50)
    parts = [text[name] for name in ("text", "id", "curve", "marks", "words", "tags")]
    assert {len(part) for part in (*parts, row["values"])} == {HEAD + TAIL}
    assert row["total"] == 0.5 * count  # of the whole answer


def test_a_short_answer_is_shown_whole() -> None:
    for count in (0, 1, HEAD, HEAD + 1, HEAD + TAIL):
        assert shown(list(range(count))) == list(range(count)) and shown(np.arange(count)) == list(range(count))
        assert drawn_of(count)[0]["more"] == 0


def test_a_row_has_a_sum_where_that_means_something() -> None:
    assert ColourRow("r3hf", "", [0.1] * 10, scale=1.0).total == 1.0
    assert ColourRow("logprob", "", [0.1] * 10, scale=1.0, summed=False).total is None
    assert ColourRow("marks", "", None, scale=1.0).values is None
    assert ColourRow("marks", "", None, scale=1.0).total is None


def test_known_credit_has_a_scale_of_its_own() -> None:
    row = known_credit_row([0.5, -2.0, 0.0])
    assert (row.title, row.scale, row.total) == ("known credit", 2.0, -1.5)
    assert known_credit_row([0.0]).scale == 1.0


def test_answers_are_spread_from_best_to_worst() -> None:
    assert spread_out([3.0, 1.0, 2.0, 5.0, 4.0], 3) == [3, 0, 1]
    assert spread_out([3.0, 1.0], 6) == [0, 1] and spread_out([], 6) == []


def test_methods_are_told_once_and_in_order() -> None:
    assert in_order(["mine", "terminal", "r3hf"]) == ["r3hf", "terminal", "mine"]
    rows = [ColourRow(name, f"what {name} does", [1.0], scale=1.0) for name in ("r3hf", "terminal", "r3hf")]
    answers = [ColouredAnswer(label="", facts=[], prompt="", texts=[], rows=part) for part in (rows[:2], rows[2:])]
    assert notes_of(answers) == {
        "r3hf": "what r3hf does",
        "terminal": "what terminal does",
    }


def test_full_colour_is_not_set_by_one_outlier_nor_by_zeros() -> None:
    usual = np.linspace(0.01, 1.0, 100)
    assert scale_of([np.append(usual, 50.0)]) < 1.0
    assert scale_of([usual, np.zeros(10_000)]) == scale_of([usual])
    assert scale_of([]) == scale_of([np.zeros(3)]) == 1.0
