import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r3hf_ray.errors import DataError
from r3hf_ray.instruments.credit.marked import (
    MarkedAnswer,
    Span,
    changed_characters,
    load_marked,
    marked_characters,
    on_characters,
    tokenise,
)
from r3hf_ray.instruments.credit.marked_credit import (
    EARLIER,
    ENOUGH_ANSWERS,
    LATER,
    MarkedMeasures,
    blame,
    corrections_won,
    finding,
    measure_marked,
    per_question,
    shared,
    with_marked_controls,
)
from r3hf_ray.instruments.pages.intervals import mean_interval
from r3hf_ray.instruments.scored_answers import Judge

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


def marked_answer(
    judge: Judge, text: str, *spans: Span, corrected: str | None = None, question: str = "Where?"
) -> MarkedAnswer:
    prompt = [{"role": "user", "content": question}]
    fixed = tokenise(prompt, corrected, judge) if corrected else None
    original = tokenise(prompt, text, judge)
    return MarkedAnswer(row=1, question=question, original=original, spans=spans, corrected=fixed)


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


def own_row(**changes: object) -> dict:
    return {"prompt": "Hi", "response": "Oh no", "spans": [{"start": 3, "end": 5}]} | changes


def qa_marks(**changes: object) -> dict:
    mark = {"error type": "Irrelevant", "start": 9, "end": 18} | changes
    return {"errors": [mark], "corrected-prediction": None}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "neither shape"}, "prompt: Field required"),
        (own_row(prompt=5), "prompt: expected text, got int 5; put text in quotes"),
        (own_row(prompt=[{"role": "user"}]), "a message has the fields role, not 'role' and 'content'"),
        (own_row(response=7), "response: Input should be a valid string"),
        (own_row(response=None, spans=[]), "response: Input should be a valid string"),
        (own_row(spans=[{"start": "x", "end": 5}]), "spans.0.start: Input should be a valid integer"),
        (own_row(spans=[{"start": -1, "end": 5}]), "spans.0.start: Input should be greater than or equal to 0"),
        (own_row(spans=[{"start": 3, "end": 50}]), "start 3, end 50: not within its 5 characters"),
        (own_row(spans=[{"start": 4, "end": 3}]), "start 4, end 3: not within its 5 characters"),
        (own_row(spans="3-5"), "spans: Input should be a valid list"),
        (own_row(corrected=5), "corrected: Input should be a valid string"),
        (qa_row(passages=None), "passages: Input should be a valid list"),
        (qa_row(passages=[[]]), "passages.0: List should have at least 1 item"),
        (qa_row(**{"prediction 1": 3}), "prediction 1: Input should be a valid string"),
        (qa_row(feedback=None), "feedback: Input should be a valid dictionary"),
        (qa_row(feedback=qa_marks(start="x")), "feedback.errors.0.start: Input should be a valid integer"),
        (qa_row(feedback=qa_marks(end=19)), "start 9, end 19: not within its 18 characters"),
    ],
)
def test_a_row_of_another_shape_is_named(byte_judge: Judge, tmp_path: Path, row: dict, words: str) -> None:
    with pytest.raises(DataError) as refused:
        load_marked(write(tmp_path / "bad.jsonl", [qa_row(), row]), byte_judge, limit=None)
    sentence = str(refused.value)
    assert f"bad.jsonl:2: is no marked answer ({words}" in sentence and "\n" not in sentence
    assert sentence.endswith("it needs question, passages, prediction 1 and feedback, or prompt, response and spans")


def test_perfect_and_reversed_credit(byte_judge: Judge) -> None:
    answers = [
        marked_answer(byte_judge, "Ann won. Bob lost.", Span(9, 18, "Irrelevant"), corrected="Ann won."),
        marked_answer(
            byte_judge, "No. Yes it is so.", Span(0, 3, "Wrong"), corrected="Yes it is so, surely.", question="Is it?"
        ),
    ]
    texts = [answer.original for answer in answers]
    fixed = [answer.corrected for answer in answers if answer.corrected]
    right = [
        np.array([-1.0 if a < b and marked_characters(t.text, m.spans)[a] else 1.0 for a, b in t.offsets])
        for t, m in zip(texts, answers, strict=True)
    ]
    flat = [np.zeros(len(t.offsets)) for t in fixed]
    original = with_marked_controls({"right": right, "wrong": [-c for c in right]}, texts, seed=0, more={})
    corrected = with_marked_controls({"right": flat, "wrong": flat}, fixed, seed=0, more={})
    rows = {row.method: row for row in measure_marked(original, corrected, answers)}
    assert rows["right"].auroc.value == 1.0 and rows["wrong"].auroc.value == 0.0
    assert rows["right"].by_kind["Wrong"].value == 1.0 and rows["right"].by_kind["Wrong"].count == 1
    assert rows["right"].marked_minus_unmarked.value < -1.5 and rows["wrong"].marked_minus_unmarked.value > 1.5
    assert rows["right"].removed.value == 0.875 and rows["right"].added.value == 0.5
    assert blame(right[0], answers[0]) == 1.0
    assert rows["random"].control and not rows["right"].control
    assert rows["right"].areas == (1.0, 1.0)
    assert rows[EARLIER].auroc.value == pytest.approx(1.0 - rows[LATER].auroc.value)
    assert rows[EARLIER].control and rows[LATER].control


def test_credit_of_the_end_token_does_not_count(byte_judge: Judge) -> None:
    answer = marked_answer(byte_judge, "good bad", Span(5, 8, "Wrong"))
    credit = np.zeros(len(answer.original.offsets))
    credit[-1] = 5.0
    assert blame(credit, answer) == 0.5


def test_an_answer_to_the_same_question_is_no_new_evidence(byte_judge: Judge) -> None:
    one = marked_answer(byte_judge, "good bad", Span(5, 8, "Wrong"))
    elsewhere = marked_answer(byte_judge, "good bad", Span(5, 8, "Wrong"), question="Who?")
    nan = float("nan")
    assert per_question([1.0, 0.5, 0.0], [one, elsewhere, one]) == [0.5, 0.5]
    assert per_question([1.0, nan, nan], [one, elsewhere, one])[0] == 1.0
    assert np.isnan(per_question([1.0, nan, nan], [one, elsewhere, one])[1])
    credit = {"right": [np.array([1.0] * 5 + [-1.0] * 3 + [0.0])] * 40}
    (row,) = measure_marked(credit, {"right": []}, [one] * 40)
    assert row.areas == (1.0,) and row.auroc.count == 1
    verdict = finding([row, row_of("random", [0.5], control=True)])
    assert (verdict.good, verdict.status) == (False, "too few answers to say")


def row_of(method: str, areas: Sequence[float], *, control: bool = False) -> MarkedMeasures:
    mean = mean_interval(areas)
    return MarkedMeasures(
        method=method,
        control=control,
        areas=tuple(areas),
        auroc=mean,
        by_kind={},
        marked_minus_unmarked=mean,
        removed=mean,
        added=mean,
    )


@pytest.mark.parametrize("count", [1, ENOUGH_ANSWERS - 1])
def test_a_verdict_needs_enough_answers(count: int) -> None:
    few = finding([row_of("r3hf", [0.9] * count), row_of("random", [0.4] * count, control=True)])
    assert (few.good, few.status, few.lead) == (False, "too few answers to say", None)
    assert few.sentence.startswith(f"Too few answers to say: {count} can be judged")
    unknown = [float("nan")] * (ENOUGH_ANSWERS - count)  # answers with one sort of text only do not count
    same = finding([row_of("r3hf", [0.9] * count + unknown), row_of("random", [0.4] * 30, control=True)])
    assert same == few
    enough = finding([row_of("r3hf", [0.9] * 30), row_of("random", [0.4] * 30, control=True)])
    assert enough.good and enough.status == "finds marks"


def test_a_method_and_a_control_are_compared_question_by_question() -> None:
    """Their own intervals overlap widely, since questions differ much; what one has more than the other does not."""
    rng = np.random.default_rng(0)
    question = rng.uniform(0.2, 1.0, size=60)
    control = row_of("random", (question - 0.02).tolist(), control=True)
    ahead = row_of("r3hf", question.tolist())
    assert ahead.auroc.low < control.auroc.value
    verdict = finding([ahead, row_of("uniform", [0.5] * 60), control])
    assert verdict.good and verdict.lead is not None and verdict.lead.low == pytest.approx(0.02)
    assert "r3hf, picked as the best of 2 methods" in verdict.sentence
    assert "+0.02 [+0.02, +0.02] on the best control, 'random'" in verdict.sentence
    scattered = row_of("r3hf", (question + rng.normal(scale=0.3, size=60)).clip(0.0, 1.0).tolist())
    verdict = finding([scattered, control])
    assert (verdict.good, verdict.status) == (False, "no better than a control")
    assert verdict.lead is not None and verdict.lead.low <= 0.0


def test_a_lead_that_own_intervals_would_grant_is_refused() -> None:
    """The method is steady, the control swings: above the control's mean for sure, above the control not."""
    swing = [0.0] * 14 + [1.0] * 18
    method, control = row_of("r3hf", [0.62] * 32), row_of("random", swing, control=True)
    assert method.auroc.low > control.auroc.value
    assert finding([method, control]).status == "no better than a control"


def test_place_in_the_answer_is_a_control_in_both_directions() -> None:
    rows = [
        row_of("r3hf", [0.7] * 40),
        row_of(EARLIER, [0.2] * 40, control=True),
        row_of(LATER, [0.8] * 40, control=True),
    ]
    verdict = finding(rows)
    assert (verdict.good, verdict.status) == (False, "no better than a control") and f"'{LATER}'" in verdict.sentence
    assert finding(rows[:2]).good


def test_a_method_at_chance() -> None:
    areas = [0.4, 0.62] * 30
    verdict = finding([row_of("r3hf", areas), row_of("random", [0.4] * 60, control=True)])
    assert (verdict.good, verdict.status) == (False, "no better than chance") and "best of 1 " in verdict.sentence


def test_pairs_have_bootstrap_intervals_over_questions(byte_judge: Judge) -> None:
    answers = [marked_answer(byte_judge, "good bad", corrected="good", question=f"Where is {i}?") for i in (0, 1, 2, 2)]
    (row,) = corrections_won({"reward model": [1.0, 2.0, -1.0, 0.0]}, answers)
    expected = mean_interval([1.0, 1.0, 0.25])  # the last two are one question: a loss and a tie
    assert row.accuracy == expected and row.accuracy.count == 3
    assert (row.accuracy.low, row.accuracy.high) == (0.25, 1.0)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(["Oh no", "\ud83d", "\r\n", " "])
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([own_row(corrected="Oh"), own_row(prompt=[{"role": "user", "content": "Hi"}]), qa_row()]),
    changes=st.dictionaries(
        st.sampled_from(
            ["prompt", "response", "spans", "corrected", "question", "passages", "prediction 1", "feedback"]
        ),
        ANY_VALUE,
        max_size=2,
    ),
)
def test_any_values_are_used_or_refused(base: dict, changes: dict, byte_judge: Judge, tmp_path: Path) -> None:
    source = write(tmp_path / "any.jsonl", [base | changes])
    try:
        load_marked(source, byte_judge, limit=None)
    except DataError as refused:
        assert source in str(refused) and str(refused).isprintable(), str(refused)
