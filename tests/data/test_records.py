"""Each published shape of row becomes the same record; what is missing is named."""

from typing import Any

import pytest

from r3hf_ray.data.records import Record, Unusable, detect, parse
from r3hf_ray.errors import DataError

USER = {"role": "user", "content": "Hi"}
ASKED = [USER]


def said(answer: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": answer}]


SHAPES: list[tuple[str, dict[str, Any], Record]] = [
    ("prompt", {"prompt": "Hi"}, Record(ASKED, [], [])),
    ("prompt", {"prompt": ASKED}, Record(ASKED, [], [])),
    ("prompt", {"prompt": "Hi", "completion": "Yes"}, Record(ASKED, ["Yes"], [])),
    ("messages", {"messages": said("Yes")}, Record(ASKED, ["Yes"], [])),
    ("preference", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, Record(ASKED, ["Yes", "No"], [(0, 1)])),
    (
        "preference",
        {"prompt": "Hi", "chosen": said("Yes"), "rejected": said("No")},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    ("preference", {"chosen": said("Yes"), "rejected": said("No")}, Record(ASKED, ["Yes", "No"], [(0, 1)])),
    (
        "hh",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        Record(ASKED, [" Yes", " No"], [(0, 1)]),
    ),
    (
        "safe_rlhf",
        {"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1, "safer_response_id": 0},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    (
        "tldr_pairs",
        {
            "info": {"subreddit": "cats", "title": "Mine", "post": "Sleeps.", "article": None},
            "summaries": [{"text": " No"}, {"text": " Yes"}],
            "choice": 1,
        },
        Record(
            [{"role": "user", "content": "SUBREDDIT: r/cats\n\nTITLE: Mine\n\nPOST: Sleeps.\n\nTL;DR:"}],
            [" Yes", " No"],
            [(0, 1)],
        ),
    ),
    (
        "nectar",
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [{"answer": "No", "rank": 2}, {"answer": "Yes", "rank": 1}, {"answer": "Nor", "rank": 2}],
        },
        Record(ASKED, ["Yes", "No", "Nor"], [(0, 1), (0, 2)]),
    ),
    ("ranked", {"prompt": "Hi", "responses": ["No", "Yes"], "pairs": [[1, 0]]}, Record(ASKED, ["No", "Yes"], [(1, 0)])),
    (
        "ranked",
        {"prompt": "Hi", "responses": ["No", "Yes", "No!"], "scores": [0, 1.5, 0]},
        Record(ASKED, ["No", "Yes", "No!"], [(1, 0), (1, 2)]),
    ),
]


@pytest.mark.parametrize(("form", "row", "record"), SHAPES)
def test_every_shape_is_detected_and_parsed(form: str, row: dict[str, Any], record: Record) -> None:
    assert detect(row, "x") == form
    assert parse(row, form) == record


@pytest.mark.parametrize(("safer", "answers"), [(0, ["Yes", "No"]), (1, ["No", "Yes"])])
def test_a_cost_model_prefers_the_less_safe_answer(safer: int, answers: list[str]) -> None:
    row = {"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1, "safer_response_id": safer}
    assert parse(row, "safe_rlhf_cost") == Record(ASKED, answers, [(0, 1)])
    with pytest.raises(Unusable, match="no preference"):
        parse(row | {"safer_response_id": None}, "safe_rlhf_cost")
    with pytest.raises(DataError, match="safer_response_id"):
        parse({name: value for name, value in row.items() if name != "safer_response_id"}, "safe_rlhf_cost")


def test_best_is_the_answer_with_most_wins() -> None:
    assert Record(ASKED, ["a", "b", "c"], [(2, 0), (2, 1), (1, 0)]).best == "c"
    assert Record(ASKED, ["a", "b"], []).best == "a"


def test_several_turns_keep_their_speakers() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: More\n\nplease\n\nAssistant:"
    record = parse({"chosen": text + " a", "rejected": text + " b"}, "hh")
    assert [turn["role"] for turn in record.prompt] == ["user", "assistant", "user"]
    assert record.prompt[-1]["content"] == "More\n\nplease"


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        (
            "hh",
            {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"},
            "no shared prompt",
        ),
        ("hh", {"chosen": "\n\nHuman: A", "rejected": "\n\nHuman: A"}, "no assistant turn"),
        (
            "hh",
            {"chosen": "\n\nHuman: A\n\nAssistant: x\n\nHuman: z", "rejected": "\n\nHuman: A\n\nAssistant: y"},
            "last turn is not",
        ),
        ("hh", {"chosen": "A\n\nAssistant: x", "rejected": "A\n\nAssistant: y"}, "no human turn"),
        ("messages", {"messages": ASKED}, "last turn is not"),
        ("messages", {"messages": said("Yes")[1:]}, "no prompt before"),
        (
            "safe_rlhf",
            {"prompt": "Hi", "response_0": "a", "response_1": "b", "better_response_id": -1},
            "no preference",
        ),
    ],
)
def test_well_formed_rows_may_be_unusable(form: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse(row, form)


@pytest.mark.parametrize(
    ("form", "row", "what"),
    [
        ("preference", {"prompt": "Hi", "chosen": "a"}, "'rejected'"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": None}, "list of messages"),
        ("prompt", {"prompt": [{"role": "user"}]}, "'content'"),
        ("tldr_pairs", {"info": "a post", "summaries": [], "choice": 0}, "info: expected an object, got str"),
        ("ranked", {"prompt": "Hi", "responses": "ab", "pairs": [[0, 1]]}, "responses: expected a list, got str"),
        *(
            ("ranked", {"prompt": "Hi", "responses": ["a", "b"], "pairs": [pair]}, f"a pair is {pair!r}, not [pref")
            for pair in ([0, 2], [-1, 0], [0, 1, 2], [0], 1, ["high", 0], [0.5, 1], "01")
        ),
        *(
            ("ranked", {"prompt": "Hi", "responses": ["a", "b"], "scores": scores}, what)
            for scores, what in (
                (["high", 1], "a score is 'high', not a number"),
                ([None, 1], "a score is None, not a number"),
                ([2, 1, 0], "3 scores of 2 responses"),
                ([2], "1 scores of 2 responses"),
            )
        ),
    ],
)
def test_rows_of_another_shape_are_refused(form: str, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as error:
        parse(row, form)
    assert what in str(error.value)


def test_unknown_columns_are_refused_with_what_would_do() -> None:
    with pytest.raises(DataError, match=r"x: columns text, label fit no known format; .*preference: chosen, prompt"):
        detect({"text": "a", "label": 1}, "x")
