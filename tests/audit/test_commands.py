"""`r3hf audit` and `r3hf credit` from the command line, and what their pages may hold."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3hf_ray.audit.answers import Judge
from r3hf_ray.audit.marked import load_marked, marked_characters, on_characters
from r3hf_ray.cli import main
from r3hf_ray.toy.author import noisy_response
from r3hf_ray.toy.language import make_request

ATTACK = "</script><script>alert('gotcha')</script><img src=x onerror=alert(1)>&\u2028"
ReadPage = Callable[[Path], Any]
SHARED = Path(__file__).parents[3] / "shared" / "data"


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
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 rows used" in said and re.search(r"r3hf +AUROC 0\.\d\d", said)
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
    assert page.data["cards"][0]["prompt"] == ATTACK and ATTACK in page.data["cards"][0]["texts"][0]["tags"]
    assert any(ATTACK in text for text in page.texts)  # the kind of error, in a table
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2


def test_a_card_has_one_value_a_token(read_page: ReadPage, byte_model: Path, tmp_path: Path) -> None:
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(marked_row(f"Ann won {i}.")) + "\n" for i in range(3)))
    arguments = ["credit", "--benchmark", str(tmp_path / "marked.jsonl"), "--reward-model", str(byte_model)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    for card in read_page(tmp_path / "out/credit.html").data["cards"]:
        (text,) = card["texts"]
        count = len(text["text"])
        assert "".join(text["text"]).endswith("<|im_end|>")
        assert count == len(text["id"]) == len(text["curve"]) == len(text["marks"]) == len(text["words"])
        assert text["marks"][:4] == [-1, -1, -1, 0] and text["tags"] == [ATTACK, *[""] * (count - 1)]
        assert [panel["values"] is None for panel in card["panels"]].count(True) == 1
        assert all(len(panel["values"]) == count for panel in card["panels"] if panel["values"] is not None)


def test_credit_on_the_toy(
    read_page: ReadPage, toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random reward model misses bars: exit code 1, each named."""
    arguments = ["--benchmark", "toy", "--reward-model", str(toy_world / "reward"), "--limit", "40"]
    assert main(["credit", *arguments, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "missed: phrase AUC of r3hf is" in said and "met: phrase AUC of the oracle is 1.000" in said
    page = read_page(tmp_path / "out/credit.html")
    titles = [panel["title"] for panel in page.data["cards"][0]["panels"]]
    assert titles[:2] == ["known credit", "r3hf"] and len(set(titles)) == len(titles)
    assert any("bars missed" in text for text in page.texts)


def test_audit_of_pairs_and_of_rankings(
    read_page: ReadPage, toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    pairs, ranked = [], []
    for _ in range(30):
        request = make_request(rng)
        first, second, third = (noisy_response(request, 48, rng) for _ in range(3))
        pairs.append({"prompt": request.text, "chosen": first, "rejected": second})
        ranked.append({"prompt": request.text, "responses": [third, second, first], "pairs": [[2, 1], [0, 1]]})
    results = []
    for name, rows in {"pairs": pairs, "ranked": ranked}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["audit", "--reward-model", str(toy_world / "reward"), "--pairs", str(tmp_path / f"{name}.jsonl")]
        assert main([*arguments, "--skip", "5", "--limit", "20", "--out", str(tmp_path / name)]) == 0
        numbers = json.loads((tmp_path / name / "audit.json").read_text())
        assert numbers["audit"]["pairs"] == 20 and len(numbers["audit"]["places"]) == 11
        assert numbers["audit"]["telescoping_error"] < 1e-5
        assert numbers["verdict"]["sentence"] in capsys.readouterr().out.replace("\n", " ")
        results.append(numbers["audit"]["accuracy"])
        page = read_page(tmp_path / name / "audit.html")
        assert len(page.data["charts"]) == 5 and len(page.data["cards"]) == 8
        assert [len(card["texts"]) for card in page.data["cards"]] == [2] * 8
    assert results[0] == results[1]  # a ranking gives its first preference


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["audit", "--pairs", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["credit", "--benchmark", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["credit", "--benchmark", "qa_feedback"], "curl -O https://raw.githubusercontent.com/allenai/FineGrainedRLHF"),
        (["credit", "--benchmark", "toy"], "does not speak the toy language"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    arguments: list[str],
    sentence: str,
    byte_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--reward-model", str(byte_model), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.skipif(not (SHARED / "qa_feedback.jsonl.gz").is_file(), reason="needs ../shared/data/qa_feedback.jsonl.gz")
def test_real_marks_are_read_exactly(byte_judge: Judge) -> None:
    """Only reads: every span of the real data lies in its text, and tokens cover what was marked."""
    answers, report = load_marked(str(SHARED / "qa_feedback.jsonl.gz"), replace(byte_judge, window=2500), limit=40)
    assert len(answers) == 40 and "left out" in report
    for answer in answers:
        spread = on_characters(np.ones(len(answer.original.offsets)), answer.original)
        assert not np.isnan(spread[marked_characters(answer.original.text, answer.spans)]).any()
