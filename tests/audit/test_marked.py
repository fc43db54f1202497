import json
from pathlib import Path

import numpy as np
import pytest

from r3hf_ray.audit.answers import Judge
from r3hf_ray.audit.human_credit import blame, human_rows, human_verdict, pair_rows, shared, with_controls
from r3hf_ray.audit.marked import (
    MarkedAnswer,
    Span,
    changed_characters,
    load_marked,
    marked_characters,
    on_characters,
    tokenise,
)
from r3hf_ray.data.sources import DataError

PROMPT = [{"role": "user", "content": "Where?"}]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa_row(**changes: object) -> dict:
    row = {
        "question": "Who won?",
        "passages": [["Title", "First\n\nsentence.", "Second."], ["Other", "Third."]],
        "prediction 1": "Ann won. Bob lost.",
        "feedback": {
            "errors": [{"error type": "Irrelevant", "start": 9, "end": 18}],
            "corrected-prediction": "Ann won.",
        },
    }
    return {**row, **changes}


def marked_answer(judge: Judge, text: str, *spans: Span, corrected: str | None = None) -> MarkedAnswer:
    fixed = tokenise(PROMPT, corrected, judge) if corrected else None
    original = tokenise(PROMPT, text, judge)
    return MarkedAnswer(row=1, question="Where?", original=original, spans=spans, corrected=fixed)


def test_offsets_are_characters_of_the_text(byte_judge: Judge) -> None:
    text = "  Grüße, Ann. "
    tokens = tokenise(PROMPT, text, byte_judge)
    assert len(tokens.offsets) == len(tokens.answer.response_ids)
    assert tokens.offsets[0] == (2, 3) and text[slice(*tokens.offsets[0])] == "G"
    start, end = tokens.offsets[-1]
    assert start == end  # the end token has no characters
    ü = text.index("ü")
    assert [offset for offset in tokens.offsets if offset == (ü, ü + 1)] == [(ü, ü + 1)] * 2  # two bytes, one character


def test_credit_is_shared_out_to_characters(byte_judge: Judge) -> None:
    tokens = tokenise(PROMPT, "aü b", byte_judge)
    assert tokens.offsets[:3] == ((0, 1), (1, 2), (1, 2))
    spread = on_characters(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 100.0]), tokens)
    np.testing.assert_array_equal(spread, [1.0, 5.0, 4.0, 5.0])  # the end token's 100 falls on nothing
    padded = tokenise(PROMPT, " ab", byte_judge)
    assert np.isnan(on_characters(np.ones(3), padded)[0])


def test_changed_characters() -> None:
    removed, added = changed_characters("two old cats", "two cats sat")
    assert "two old cats"[removed.argmax() : len(removed) - removed[::-1].argmax()] == "old"
    assert "two cats sat"[added.argmax() :] == "sat"
    same, none = changed_characters("a b", "a b")
    assert not same.any() and not none.any()


def test_shared_payments() -> None:
    np.testing.assert_allclose(shared(np.array([0.0, 0.0, 3.0, 0.0, 1.0])), [1.0, 1.0, 1.0, 0.5, 0.5])
    np.testing.assert_allclose(shared(np.array([2.0, 0.0])), [2.0, 0.0])


def test_reading_qa_feedback(byte_judge: Judge, tmp_path: Path) -> None:
    long = qa_row(question="x" * 600)
    empty = qa_row(**{"prediction 1": "  ", "feedback": {"errors": [], "corrected-prediction": "Ann."}})
    unchanged = qa_row(feedback={"errors": [], "corrected-prediction": "Ann won. Bob lost."})
    answers, report = load_marked(
        write(tmp_path / "a.jsonl", [qa_row(), long, empty, unchanged]), byte_judge, limit=None
    )
    assert [answer.row for answer in answers] == [1, 4] and answers[1].corrected is None
    assert "2 of 4 rows used" in report and "over 511 tokens (line 2)" in report and "empty answer (line 3)" in report
    first = answers[0]
    assert first.spans == (Span(9, 18, "Irrelevant"),)
    assert first.corrected is not None and first.corrected.text == "Ann won."
    prompt = byte_judge.tokenizer.decode(first.original.answer.prompt_ids)
    assert "Who won?\n\nPassages:\nTitle: First sentence. Second.\nOther: Third.<|im_end|>" in prompt
    array = tmp_path / "a.json"
    array.write_text(json.dumps([qa_row()]))
    assert load_marked(str(array), byte_judge, limit=5)[0][0].original == first.original


def test_reading_ones_own(byte_judge: Judge, tmp_path: Path) -> None:
    row = {"prompt": "Hi", "response": "Oh no", "spans": [{"start": 3, "end": 5, "kind": "rude"}]}
    (answer,), _ = load_marked(write(tmp_path / "own.jsonl", [row]), byte_judge, limit=None)
    assert answer.spans == (Span(3, 5, "rude"),) and answer.corrected is None and answer.question == "Hi"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "neither shape"},
        {"prompt": "Hi", "response": "Oh no", "spans": [{"start": 3, "end": 50}]},
        qa_row(passages=None),
    ],
)
def test_a_row_of_another_shape_is_named(byte_judge: Judge, tmp_path: Path, row: dict) -> None:
    with pytest.raises(DataError, match=r"bad\.jsonl:2: is no marked answer"):
        load_marked(write(tmp_path / "bad.jsonl", [qa_row(), row]), byte_judge, limit=None)


def test_perfect_and_reversed_credit(byte_judge: Judge) -> None:
    answers = [
        marked_answer(byte_judge, "Ann won. Bob lost.", Span(9, 18, "Irrelevant"), corrected="Ann won."),
        marked_answer(byte_judge, "No. Yes it is so.", Span(0, 3, "Wrong"), corrected="Yes it is so, surely."),
    ]
    texts = [answer.original for answer in answers]
    fixed = [answer.corrected for answer in answers if answer.corrected]
    right = [
        np.array([-1.0 if a < b and marked_characters(t.text, m.spans)[a] else 1.0 for a, b in t.offsets])
        for t, m in zip(texts, answers, strict=True)
    ]
    flat = [np.zeros(len(t.offsets)) for t in fixed]
    original = with_controls({"right": right, "wrong": [-c for c in right]}, texts, seed=0, more={})
    corrected = with_controls({"right": flat, "wrong": flat}, fixed, seed=0, more={})
    rows = {row.method: row for row in human_rows(original, corrected, answers)}
    assert rows["right"].auroc.value == 1.0 and rows["wrong"].auroc.value == 0.0
    assert rows["right"].by_kind["Wrong"].value == 1.0 and rows["right"].by_kind["Wrong"].count == 1
    assert rows["right"].marked_minus_unmarked.value < -1.5 and rows["wrong"].marked_minus_unmarked.value > 1.5
    assert rows["right"].removed.value == 0.875 and rows["right"].added.value == 0.5
    assert blame(right[0], answers[0]) == 1.0
    assert rows["random"].control and not rows["right"].control
    assert human_verdict(list(rows.values())).sentence.count("right puts marked below unmarked text") == 1


def test_credit_of_the_end_token_does_not_count(byte_judge: Judge) -> None:
    answer = marked_answer(byte_judge, "good bad", Span(5, 8, "Wrong"))
    credit = np.zeros(len(answer.original.offsets))
    credit[-1] = 5.0
    assert blame(credit, answer) == 0.5


def test_pairs() -> None:
    (row,) = pair_rows({"reward model": [1.0, 2.0, -1.0, 0.0]})
    assert row.accuracy.value == pytest.approx(2.5 / 4) and row.accuracy.count == 4
