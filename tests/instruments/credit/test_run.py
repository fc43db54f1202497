"""`r3hf credit` from the command line, and what its page may hold."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from r3hf_ray.cli import main
from r3hf_ray.instruments.credit.marked import load_marked, marked_characters, on_characters
from r3hf_ray.instruments.scored_answers import Judge

ATTACK = "</script><script>alert('gotcha')</script><img src=x onerror=alert(1)>&\u2028"
ReadPage = Callable[[Path], Any]
SHARED = Path(__file__).parents[4] / "shared" / "data"


def marked_row(text: str, question: str = "Who won?") -> dict:
    errors = [{"error type": ATTACK, "start": 0, "end": 3}]
    feedback = {"errors": errors, "corrected-prediction": "Bob did, " + text}
    return {"question": question, "passages": [], "prediction 1": text, "feedback": feedback}


def test_credit_on_marked_answers(
    read_page: ReadPage, byte_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [marked_row(f"Ann won {i} times. Bob lost. {ATTACK if i == 0 else ''}", ATTACK) for i in range(6)]
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["credit", "--benchmark", str(tmp_path / "marked.jsonl"), "--reward-model", str(byte_model)]
    assert main([*arguments, "--limit", "9", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 rows used, fewer than the limit of 9" in said and re.search(r"r3hf +AUROC 0\.\d\d", said)
    numbers = json.loads((tmp_path / "out/credit.json").read_text())
    methods = [row["method"] for row in numbers["rows"]]
    assert {"r3hf", "segment", "abc", "random", "earlier is better", "untrained reward model"} <= set(methods)
    assert [pair["name"] for pair in numbers["corrected_pairs"]] == [
        "reward model",
        "untrained reward model",
        "longer wins",
    ]
    assert numbers["corrected_pairs"][2]["accuracy"]["value"] == 1.0
    page = read_page(tmp_path / "out/credit.html")
    assert len(page.scripts) == 3 and not any("gotcha" in script for script in page.scripts[1:])
    assert not any(tag == "img" or name.startswith("on") for tag, attributes in page.tags for name in attributes)
    assert page.data["answers"][0]["prompt"] == ATTACK and ATTACK in page.data["answers"][0]["texts"][0]["tags"]
    assert any(ATTACK in text for text in page.texts)  # the kind of error, in a table
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2


def test_a_card_has_one_value_a_token(read_page: ReadPage, byte_model: Path, tmp_path: Path) -> None:
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(marked_row(f"Ann won {i}.")) + "\n" for i in range(3)))
    arguments = ["credit", "--benchmark", str(tmp_path / "marked.jsonl"), "--reward-model", str(byte_model)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    for card in read_page(tmp_path / "out/credit.html").data["answers"]:
        (text,) = card["texts"]
        count = len(text["text"])
        assert "".join(text["text"]).endswith("<|im_end|>")
        assert count == len(text["id"]) == len(text["curve"]) == len(text["marks"]) == len(text["words"])
        assert text["marks"][:4] == [-1, -1, -1, 0] and text["tags"] == [ATTACK, *[""] * (count - 1)]
        assert [panel["values"] is None for panel in card["rows"]].count(True) == 1
        assert all(len(panel["values"]) == count for panel in card["rows"] if panel["values"] is not None)


def test_credit_on_the_toy(
    read_page: ReadPage, toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random reward model misses bars: exit code 1, each named."""
    arguments = ["--benchmark", "toy", "--reward-model", str(toy_world / "reward"), "--limit", "240"]
    assert main(["credit", *arguments, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "missed: phrase AUC of r3hf is" in said and "met: phrase AUC of the oracle is 1.000" in said
    page = read_page(tmp_path / "out/credit.html")
    titles = [panel["title"] for panel in page.data["answers"][0]["rows"]]
    assert titles[:2] == ["known credit", "r3hf"] and len(set(titles)) == len(titles)
    assert any("bars missed" in text for text in page.texts)


def test_the_toy_is_not_judged_by_a_handful(
    read_page: ReadPage, toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither met nor missed, on the console, on the page and in the numbers; the exit code says nothing either."""
    arguments = ["--benchmark", "toy", "--reward-model", str(toy_world / "reward"), "--limit", "8"]
    assert main(["credit", *arguments, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("not judged: ") == 5 and "missed: " not in said and not re.search("^met: ", said, re.MULTILINE)
    assert [bar["holds"] for bar in json.loads((tmp_path / "out/credit.json").read_text())["bars"]] == [None] * 5
    texts = read_page(tmp_path / "out/credit.html").texts
    assert any(text.startswith("Not judged: too few responses") for text in texts)
    assert texts.count("not judged") == 6 and not {"met", "missed", "bars met", "bars missed"} & set(texts)


def qa_without_marks(text: str) -> dict:
    return {"question": "Who did?", "passages": [], "prediction 1": text, "feedback": {"errors": []}}


def untrained_row(folder: Path) -> dict:
    rows = json.loads((folder / "credit.json").read_text())["rows"]
    return next(row for row in rows if row["method"] == "untrained reward model")


def test_the_untrained_control_owes_nothing_to_the_reward_model(byte_model: Path, tmp_path: Path) -> None:
    """Its credit depends on the configuration and the seed only: another model of that shape has the same control."""
    other = AutoModelForSequenceClassification.from_pretrained(byte_model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.7).add_(0.01)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path / "other")
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(marked_row(f"Ann won {i}.")) + "\n" for i in range(4)))
    for name, model in {"one": byte_model, "two": tmp_path / "other"}.items():
        arguments = ["credit", "--benchmark", str(tmp_path / "marked.jsonl"), "--reward-model", str(model)]
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    assert untrained_row(tmp_path / "one") == untrained_row(tmp_path / "two")
    numbers = [json.loads((tmp_path / name / "credit.json").read_text())["rows"] for name in ("one", "two")]
    assert numbers[0] != numbers[1]  # the reward models themselves differ


def test_few_marked_answers_are_too_few_to_say(
    read_page: ReadPage, byte_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [marked_row("Ann won."), marked_row("Ann won not.", "Who lost?"), qa_without_marks("Bob did.")]
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["credit", "--benchmark", str(tmp_path / "marked.jsonl"), "--reward-model", str(byte_model)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "Too few answers to say: 2 can be judged" in capsys.readouterr().out.replace("\n", " ")
    verdict = json.loads((tmp_path / "out/credit.json").read_text())["verdict"]
    assert (verdict["good"], verdict["status"]) == (False, "too few answers to say")
    assert "too few answers to say" in read_page(tmp_path / "out/credit.html").texts


@pytest.mark.skipif(not (SHARED / "qa_feedback.jsonl.gz").is_file(), reason="needs ../shared/data/qa_feedback.jsonl.gz")
def test_real_marks_are_read_exactly(byte_judge: Judge) -> None:
    """Only reads: every span of the real data lies in its text, and tokens cover what was marked."""
    answers, report = load_marked(str(SHARED / "qa_feedback.jsonl.gz"), replace(byte_judge, window=2500), limit=40)
    assert len(answers) == 40 and "left out" in report
    for answer in answers:
        spread = on_characters(np.ones(len(answer.original.offsets)), answer.original)
        assert not np.isnan(spread[marked_characters(answer.original.text, answer.spans)]).any()
