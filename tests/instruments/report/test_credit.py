from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from r3hf_ray.algorithms.redistribution import PrefixScores, redistribute
from r3hf_ray.algorithms.scaling import normalize, normalize_shares
from r3hf_ray.instruments.pages.coloured_answers import ColouredAnswer
from r3hf_ray.instruments.report.credit import Payment, coloured_answers, paid_by_method, payment_of
from r3hf_ray.records.samples import write_samples

TEXTS = ("Stir", " well", ".", " Eat", "<eos>")
PREFIX = (0.25, 1.0, 0.5, 0.75, 2.0)
PAYMENT = Payment(mode="r3hf", mean=0.5, std=2.0)


def response(prompt_id: int = 4, prefix: tuple[float, ...] = PREFIX, **columns: Any) -> list[dict[str, Any]]:
    """Rows of a response that starts at a score of -0.5 and ends at ``prefix[-1]``."""
    known = columns.pop("gold_credit", [None] * len(TEXTS))
    return [
        {
            "step": 1, "prompt_id": prompt_id, "sample": 0, "position": i, "token_id": 7 + i, "token": text,
            "prompt": "cook?", "reward": 0.1 * i, "kl": 0.0, "value": 0.0, "advantage": 0.0, "logprob": -1.0,
            "prefix_score": prefix[i], "score": prefix[-1], "prompt_score": -0.5, "gold": None, "finish": "eos",
            "gold_credit": known[i],
        }
        | columns
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip


def answers_of(folder: Path, rows: list[dict[str, Any]], payment: Payment = PAYMENT) -> list[ColouredAnswer]:
    write_samples(folder, 1, rows)
    return coloured_answers(folder, payment)


def titles(answer: ColouredAnswer) -> list[str]:
    return [row.title for row in answer.rows]


def test_every_method_sums_to_what_it_promises(tmp_path: Path) -> None:
    score, gain = (2.0 - 0.5) / 2.0, (2.0 + 0.5) / 2.0
    expected = {"terminal": score, "r3hf": gain, "uniform": score, "segment": gain}
    paid = paid_by_method(response(), PAYMENT)
    assert {name: credit.sum() for name, credit in paid.items()} == pytest.approx(expected, abs=1e-12)
    (answer,) = answers_of(tmp_path, response(), Payment(mode="abc", mean=0.5, std=2.0))
    shown = {row.title: row.total for row in answer.rows if not row.own}
    assert shown == pytest.approx(expected, rel=1e-3)
    assert [sum(row.values) for row in answer.rows] == pytest.approx([row.total for row in answer.rows])


def test_each_method_pays_where_it_says() -> None:
    paid = paid_by_method(response(), PAYMENT)
    np.testing.assert_allclose(paid["r3hf"], [0.375, 0.375, -0.25, 0.125, 0.625])
    np.testing.assert_allclose(paid["segment"], [0.0, 0.0, 0.5, 0.0, 0.75])  # at the full stop and at the end
    np.testing.assert_allclose(paid["uniform"], [0.15] * 5)
    np.testing.assert_allclose(paid["terminal"], [0.0, 0.0, 0.0, 0.0, 0.75])


@pytest.mark.parametrize("mode", ["terminal", "r3hf", "uniform"])
def test_a_plain_method_is_what_the_learner_pays(mode: str) -> None:
    scores = PrefixScores(prefix=torch.tensor([PREFIX]), prompt=torch.tensor([-0.5]), pooled=torch.tensor([2.0]))
    mask = torch.ones(1, len(PREFIX), dtype=torch.bool)
    raw = redistribute(scores, mask, mode=mode, beta_c=1.0, subtract_prompt_score=True)
    learner = (
        normalize_shares(raw, scores.pooled, mask, mean=0.5, scale=2.0)
        if mode == "uniform"
        else normalize(raw, mask, mean=0.5, scale=2.0, terminal_weight=float(mode == "terminal"))
    )
    np.testing.assert_allclose(paid_by_method(response(), PAYMENT)[mode], learner[0], atol=1e-6)


def test_the_run_s_own_row_is_what_it_paid(tmp_path: Path) -> None:
    (answer,) = answers_of(tmp_path, response())
    assert titles(answer) == ["r3hf", "segment", "uniform", "terminal"]
    assert [row.own for row in answer.rows] == [True, False, False, False]
    assert answer.rows[0].values == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert len({row.scale for row in answer.rows}) == 1


@pytest.mark.parametrize(("mode", "title"), [("abc", "abc"), ("my.module:bonus", "bonus")])
def test_a_method_that_cannot_be_recomputed_has_the_run_s_rewards(tmp_path: Path, mode: str, title: str) -> None:
    (answer,) = answers_of(tmp_path, response(), Payment(mode=mode))
    assert titles(answer) == [title, "r3hf", "segment", "uniform", "terminal"]
    assert answer.rows[0].own and mode.partition(":")[0] in answer.rows[0].note + mode


def test_several_models_are_shown_with_their_parts(tmp_path: Path) -> None:
    rows = response(**{"reward/reward": 0.3, "reward/cost": -0.1})
    (answer,) = answers_of(tmp_path, rows, Payment(mode="r3hf", several=True))
    assert titles(answer) == ["all models", "reward/reward", "reward/cost", "r3hf", "segment", "uniform", "terminal"]
    assert answer.rows[2].values == [-0.1] * 5


def test_known_credit_is_underlined_and_has_a_row(tmp_path: Path) -> None:
    (answer,) = answers_of(tmp_path, response(gold_credit=[1.0, 0.0, -0.5, 0.0, 0.0]))
    (text,) = answer.texts
    assert list(text.marks) == [1, 0, -1, 0, 0] and answer.rows[0].values == [1.0, 0.0, -0.5, 0.0, 0.0]
    assert titles(answer)[0] == "known credit" and answer.rows[0].total == 0.5
    assert not answer.rows[0].own and answer.rows[1].own


def test_without_known_credit_nothing_is_underlined(tmp_path: Path) -> None:
    (answer,) = answers_of(tmp_path, response())
    assert "known credit" not in titles(answer) and not answer.texts[0].marks


def test_the_curve_starts_at_the_prompt_and_ends_at_the_score(tmp_path: Path) -> None:
    (answer,) = answers_of(tmp_path, response())
    (text,) = answer.texts
    assert text.start == -0.5 and text.curve == [-0.125, 0.25, 0.0, 0.125, 0.75]
    assert answer.facts[0] == ("score", "+0.75")


def test_best_and_worst_of_the_last_and_the_first_dump(tmp_path: Path) -> None:
    for step in (1, 5, 10):
        rows = [row for k in range(3) for row in response(k, (*PREFIX[:-1], float(k)))]
        write_samples(tmp_path, step, rows)
    labels = [answer.label for answer in coloured_answers(tmp_path, PAYMENT)]
    assert labels == [
        "Step 10, best score of 3",
        "Step 10, worst score of 3",
        "Step 1, best score of 3",
        "Step 1, worst score of 3",
    ]


def test_a_dump_without_the_prompt_s_score_has_no_cards(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 1, response())
    pq.write_table(pq.read_table(path).drop_columns(["prompt_score", "gold_credit"]), path)
    assert coloured_answers(tmp_path, PAYMENT) == []


def test_the_unit_is_the_main_model_s_calibration() -> None:
    def calibrated(**fields: Any) -> dict[str, Any]:
        return {"event": "calibrated", **fields}

    events = [
        calibrated(mean=9.0, std=9.0),
        calibrated(model="reward", mean=-0.5, std=4.0),
        calibrated(model="cost", mean=7.0, std=7.0),
    ]
    config = {"reward": {"mode": "terminal"}, "model": {"reward_weight": 0.5, "cost": "models/cost"}}
    assert payment_of(config, events) == Payment(mode="terminal", several=True, mean=-0.5, std=8.0)
    assert payment_of({}, events[:1]) == Payment(mode="r3hf", several=False, mean=9.0, std=9.0)
    assert payment_of({}, []) == Payment() and "own units" in Payment().unit
