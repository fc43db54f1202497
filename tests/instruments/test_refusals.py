"""What `r3hf audit` and `r3hf credit` cannot use is one sentence, and nothing is written."""

from pathlib import Path

import pytest

from r3hf_ray.cli import main


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
