"""Each published shape of row becomes the same record; what is missing is named."""

from typing import Any

import pytest

from r3hf_ray.data.records import Record, detect, parse
from r3hf_ray.errors import DataError, Unusable

USER = {"role": "user", "content": "Hi"}
ASKED = [USER]
UNANSWERED = Record(ASKED, [], [], "no answer to learn from")


SYSTEM = {"role": "system", "content": "Be brief."}


def said(answer: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": answer}]


SHAPES: list[tuple[str, dict[str, Any], Record]] = [
    ("prompt", {"prompt": "Hi"}, UNANSWERED),
    ("prompt", {"prompt": ASKED}, UNANSWERED),
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


SHARE_GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
TYPED = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
PUBLISHED: dict[str, tuple[str, dict[str, Any], Record]] = {
    "ShareGPT": ("messages", {"conversations": SHARE_GPT}, Record(ASKED, ["Yes"], [])),
    "LMSYS-Chat": ("messages", {"conversation": said("Yes"), "turn": 1}, Record(ASKED, ["Yes"], [])),
    "RLVR": ("messages", {"messages": ASKED, "ground_truth": "1"}, UNANSWERED),
    "typed content": ("messages", {"messages": [*TYPED, *said("Yes")[1:]]}, Record(ASKED, ["Yes"], [])),
    "GSM8K": ("prompt", {"question": "Hi", "answer": "Yes"}, Record(ASKED, ["Yes"], [])),
    "MATH": ("prompt", {"problem": "Hi", "solution": "Yes", "answer": "y"}, Record(ASKED, ["Yes"], [])),
    "Alpaca": (
        "prompt",
        {"instruction": "Hi", "input": "there", "output": "Yes"},
        Record([{"role": "user", "content": "Hi\n\nthere"}], ["Yes"], []),
    ),
    "Alpaca without input": ("prompt", {"instruction": "Hi", "input": "", "output": ""}, Record(ASKED, [""], [])),
    "Dolly": (
        "prompt",
        {"instruction": "Hi", "context": "there", "response": "Yes", "category": "chat"},
        Record([{"role": "user", "content": "Hi\n\nthere"}], ["Yes"], []),
    ),
    "Orca DPO": (
        "preference",
        {"system": "Be brief.", "question": "Hi", "chosen": "Yes", "rejected": "No"},
        Record([SYSTEM, USER], ["Yes", "No"], [(0, 1)]),
    ),
    "an empty system prompt": ("prompt", {"prompt": "Hi", "system": ""}, UNANSWERED),
    "UltraFeedback": (
        "preference",
        {
            **{"prompt": "Hi", "prompt_id": "1", "messages": said("Yes")},
            **{"chosen": said("Yes"), "rejected": said("No"), "score_chosen": 8.0, "score_rejected": 7.5},
        },
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    "a prompt that is the last turn": (
        "preference",
        {"prompt": "Hi", "chosen": [SYSTEM, *said("Yes")], "rejected": [SYSTEM, *said("No")]},
        Record([SYSTEM, USER], ["Yes", "No"], [(0, 1)]),
    ),
    "a prompt that has more turns": (
        "preference",
        {"prompt": [SYSTEM, USER], "chosen": said("Yes"), "rejected": said("No")},
        Record([SYSTEM, USER], ["Yes", "No"], [(0, 1)]),
    ),
    "a prompt that is null": (
        "preference",
        {"prompt": None, "chosen": said("Yes"), "rejected": said("No")},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    "ShareGPT with answers apart": (
        "preference",
        {"conversations": SHARE_GPT[:1], "chosen": SHARE_GPT[1], "rejected": {"from": "gpt", "value": "No"}},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    "TRL's conversations": (
        "prompt",
        {"prompt": ASKED, "completion": said("Yes")[1:], "tools": None, "images": []},
        Record(ASKED, ["Yes"], []),
    ),
    "HH-RLHF of Windows": (
        "hh",
        {
            "chosen": "\r\n\r\nHuman: Hi\r\n\r\nAssistant: Yes",
            "rejected": "\r\n\r\nHuman: Hi\r\n\r\nAssistant: No",
        },
        Record(ASKED, [" Yes", " No"], [(0, 1)]),
    ),
    "HH-RLHF beside its prompt": (
        "hh",
        {
            "prompt": "Human: Hi\n\nAssistant:",
            "chosen": "Human: Hi\n\nAssistant: Yes",
            "rejected": "Human: Hi\n\nAssistant: No",
        },
        Record(ASKED, [" Yes", " No"], [(0, 1)]),
    ),
    "HelpSteer2": (
        "helpsteer",
        {"prompt": "Hi", "response_1": "No", "response_2": "Yes", "preference_strength": 2},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    "HelpSteer3": (
        "helpsteer",
        {"context": ASKED, "response1": "Yes", "response2": "No", "overall_preference": -1},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    "Chatbot Arena": (
        "arena",
        {"conversation_a": said("No"), "conversation_b": said("Yes"), "winner": "model_b"},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
    "PKU-SafeRLHF as CSV": (
        "safe_rlhf",
        {"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": "1"},
        Record(ASKED, ["Yes", "No"], [(0, 1)]),
    ),
}


@pytest.mark.parametrize(("form", "row", "record"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_rows_as_people_publish_them(form: str, row: dict[str, Any], record: Record) -> None:
    assert detect(row, "x") == form
    assert parse(row, form) == record


PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
TWO = {"prompt": "Hi", "response_a": "Yes", "response_b": "No"}
GRADED = {"prompt": "Hi", "response_1": "Yes", "response_2": "No", "preference_strength": 0}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *((PAIR | {"winner": winner}, "stated tie") for winner in ("tie", "Tie (both bad)", "draw", "both")),
        *((PAIR | {"is_tie": tie}, "stated tie") for tie in (True, 1, "true")),
        (PAIR | {"label": "tie"}, "stated tie"),
        (PAIR | {"score_chosen": 4.0, "score_rejected": 4.0}, "stated tie"),
        (PAIR | {"chosen_score": "4", "rejected_score": "4"}, "stated tie"),
        (PAIR | {"chosen-rating": 4, "rejected-rating": 4}, "stated tie"),
        (PAIR | {"is_tie": False, "winner": "chosen", "score_chosen": None, "score_rejected": None}, ""),
        (PAIR | {"chosen_score": "", "rejected_score": ""}, ""),
        (TWO | {"winner": "model_a"}, ""),
        (TWO | {"winner": "tie"}, "no preference stated"),
        (GRADED, "no preference stated"),
        (GRADED | {"preference_strength": "-1"}, ""),
        *(
            ({"prompt": "Hi", "completion": "No", "label": label}, "labelled undesirable")
            for label in (False, 0, "False")
        ),
        *(({"prompt": "Hi", "completion": "No", "label": label}, "") for label in (True, 1, "True", None, "")),
        ({"prompt": "Hi", "completion": "No", "label": 3}, "label neither true nor false"),
        ({"messages": said("No"), "kto_tag": False}, "labelled undesirable"),
        ({"prompt": "Hi", "label": False}, "no answer to learn from"),
    ],
)
def test_a_label_says_what_may_be_learnt(row: dict[str, Any], reason: str) -> None:
    """An undesirable answer is not imitated and a tie is no preference, but the prompt can be used."""
    record = parse(row, detect(row, "x"))
    assert (record.prompt, record.lacks) == (ASKED, reason)
    assert bool(record.answers) == (not reason)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        *(({column: ["cat.png"]}, "images") for column in ("image", "images", "videos", "audio")),
        ({"images": [{"bytes": b"x", "path": None}]}, "images"),
        *(({column: [{"name": "search"}]}, "tools") for column in ("tools", "functions")),
        ({"tools": '[{"name": "search"}]'}, "tools"),
        ({"history": [["Ho", "Hm"]]}, "earlier turns"),
        ({"reasoning_content": "Well"}, "a thought"),
        *(
            ({name: value}, None)
            for name in ("images", "tools", "history", "thinking")
            for value in (None, [], "", "[]", [None], {"bytes": None}, False)
        ),
    ],
)
def test_what_is_not_read_leaves_the_row_out(more: dict[str, Any], reason: str | None) -> None:
    for row in (PAIR | more, {"messages": [USER, {"role": "assistant", "content": "Yes"} | more]}):
        if reason is None:
            assert parse(row, detect(row, "x")).answers[0] == "Yes"
        else:
            with pytest.raises(Unusable, match=reason):
                parse(row, detect(row, "x"))


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "cat.png"}]}, "content that is not text"),
        ({"role": "user", "content": ["Hi"]}, "content that is not text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "nothing in content"),
        ({"role": "user", "content": None}, "nothing in content"),
        ({"role": None, "content": "Hi"}, "nothing in role"),
        ({"role": "tool", "content": "Hi"}, "a turn that is not the user's"),
        ({"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}, "tools"),
    ],
)
def test_a_turn_that_is_no_text_leaves_the_row_out(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse({"messages": [turn, *said("Yes")]}, "messages")


def test_windows_line_ends_do_not_matter() -> None:
    row = {"prompt": "one\r\ntwo", "completion": "three\r\nfour"}
    assert parse(row, "prompt") == Record([{"role": "user", "content": "one\ntwo"}], ["three\nfour"], [])


@pytest.mark.parametrize(("form", "row", "record"), SHAPES)
def test_every_shape_is_detected_and_parsed(form: str, row: dict[str, Any], record: Record) -> None:
    assert detect(row, "x") == form
    assert parse(row, form) == record


@pytest.mark.parametrize(("safer", "answers"), [(0, ["Yes", "No"]), (1, ["No", "Yes"])])
def test_a_cost_model_prefers_the_less_safe_answer(safer: int, answers: list[str]) -> None:
    row = {"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1, "safer_response_id": safer}
    assert parse(row, "safe_rlhf_cost") == Record(ASKED, answers, [(0, 1)])
    undecided = Record(ASKED, [], [], "no preference stated")
    assert parse(row | {"safer_response_id": None}, "safe_rlhf_cost") == undecided
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
        ("messages", {"messages": [*said("Yes"), {"role": "system", "content": "S"}]}, "last turn is not"),
        ("messages", {"messages": []}, "nothing in messages"),
        ("messages", {"messages": said("Yes")[1:]}, "no prompt before"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": None}, "nothing in rejected"),
        ("preference", {"prompt": None, "chosen": said("a")[1:], "rejected": said("b")[1:]}, "no prompt before"),
        ("preference", {"prompt": "Ho", "chosen": said("a"), "rejected": said("b")}, "no shared prompt"),
        ("prompt", {"prompt": " \n"}, "empty prompt"),
        ("prompt", {"prompt": "cut emoji \ud83d"}, "half a character"),
        ("prompt", {"prompt": "Hi", "system": "A", "completion": None} | {"prompt": [SYSTEM, USER]}, "two system"),
    ],
)
def test_well_formed_rows_may_be_unusable(form: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse(row, form)


@pytest.mark.parametrize(
    ("form", "row", "what"),
    [
        ("preference", {"prompt": "Hi", "chosen": "a"}, "'rejected'"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": 4}, "rejected: expected text, got int 4"),
        ("prompt", {"prompt": [{"role": "user"}]}, "'content'"),
        ("prompt", {"prompt": ["Hi"]}, "a message is 'Hi', not an object"),
        ("prompt", {"question": "Hi", "context": {"page": 1}}, "input: expected text, got dict"),
        ("nectar", {"prompt": "Hi", "answers": [{"answer": "a", "rank": None}]}, "a score is None, not a number"),
        ("tldr_pairs", {"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0}, "1 summaries, not two"),
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
    with pytest.raises(DataError, match=r"x: columns text, label fit no known format; .*preference: chosen, rejected"):
        detect({"text": "a", "label": 1}, "x")
