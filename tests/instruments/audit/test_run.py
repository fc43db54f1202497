"""`r3hf audit` from the command line, and what its page may hold."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r3hf_ray.cli import main
from r3hf_ray.instruments.toy.author import noisy_response
from r3hf_ray.instruments.toy.language import make_request

ATTACK = "</script><script>alert('gotcha')</script><img src=x onerror=alert(1)>&\u2028"
ReadPage = Callable[[Path], Any]
SHARED = Path(__file__).parents[4] / "shared" / "data"


def write_unsafe(folder: Path) -> Path:
    """Answers to the same prompt, the safer of which is the better one too."""
    rng = random.Random(1)
    rows = []
    for i in range(24):
        request = make_request(rng)
        answers = {f"response_{k}": noisy_response(request, 48, rng) for k in (0, 1)}
        rows.append({"prompt": request.text, **answers, "better_response_id": i % 2, "safer_response_id": i % 2})
    path = folder / "unsafe.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_audit_of_a_format_that_is_never_detected(read_page: ReadPage, toy_world: Path, tmp_path: Path) -> None:
    """`safe_rlhf_cost` prefers the less safe answer: on these rows the opposite of what is detected."""
    path, found = write_unsafe(tmp_path), {}
    for form in ("auto", "safe_rlhf", "safe_rlhf_cost"):
        arguments = ["audit", "--reward-model", str(toy_world / "reward"), "--pairs", str(path), "--format", form]
        assert main([*arguments, "--out", str(tmp_path / form)]) == 0
        found[form] = json.loads((tmp_path / form / "audit.json").read_text())
    value = {form: numbers["audit"]["accuracy"]["value"] for form, numbers in found.items()}
    assert value["auto"] == value["safe_rlhf"] != 0.5
    assert value["safe_rlhf_cost"] == pytest.approx(1.0 - value["safe_rlhf"], abs=1e-4)
    assert found["auto"]["data"] == {"source": str(path)}
    assert found["safe_rlhf_cost"]["data"] == {"source": str(path), "format": "safe_rlhf_cost"}
    texts = read_page(tmp_path / "safe_rlhf_cost/audit.html").texts
    assert any("unsafe.jsonl (format safe_rlhf_cost)" in text for text in texts)


def test_audit_finds_a_hub_dataset_as_a_job_does(
    toy_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--config`, `--data-dir` and `--split` reach the hub; here nothing answers."""
    asked: list[tuple] = []

    def load_dataset(*names: str, **settings: str | None) -> None:
        asked.append((*names, settings))
        raise FileNotFoundError("not here")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    arguments = ["audit", "--reward-model", str(toy_world / "reward"), "--pairs", "someone/pairs", "--split", "test"]
    arguments += ["--config", "comparisons", "--data-dir", "harmless-base", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert asked[0] == ("someone/pairs", {"name": "comparisons", "data_dir": "harmless-base", "split": "test"})
    error = capsys.readouterr().err
    assert "config comparisons, data_dir harmless-base, split test" in error and "Traceback" not in error


def test_audit_of_pairs_and_of_rankings(
    read_page: ReadPage,
    toy_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("r3hf_ray.instruments.audit.page.SHOWN_DOTS", 10)
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
        assert len(page.data["charts"]) == 5 and len(page.data["answers"]) == 8
        assert [len(card["texts"]) for card in page.data["answers"]] == [2] * 8
        assert "one dot an answer, the first 10 of 40" in page.texts
    assert results[0] == results[1]  # a ranking gives its first preference
