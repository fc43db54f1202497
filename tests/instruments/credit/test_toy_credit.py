import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from r3hf_ray.errors import ModelError
from r3hf_ray.instruments.credit.toy_credit import (
    ENOUGH_RESPONSES,
    Agreement,
    ToyMeasures,
    ToyResponse,
    first_advantages,
    measure_on_toy,
    requirements,
    reward_model_agreement,
    toy_responses,
    with_toy_controls,
)
from r3hf_ray.instruments.pages.intervals import Estimate
from r3hf_ray.instruments.scored_answers import (
    Answer,
    credit_by_method,
    load_judge,
    r3hf_credit,
    score_answers,
    unit_of,
)
from r3hf_ray.instruments.toy.language import gold_credit, make_request, phrase_ids


@pytest.fixture(scope="module")
def measured(toy_world: Path) -> tuple:
    judge = load_judge(str(toy_world / "reward"), attention=True)
    responses = toy_responses(judge, None, count=240, max_response_tokens=48, seed=0)
    scored = score_answers(judge, [response.answer for response in responses])
    unit = unit_of(scored)
    return judge, responses, scored, unit


def test_every_method_is_paid_and_sums_to_its_total(measured: tuple) -> None:
    judge, _, scored, unit = measured
    paid = credit_by_method(judge, scored, unit)
    assert {"terminal", "r3hf", "uniform", "abc", "segment"} <= paid.keys()
    totals = np.array([unit.of(s.score) for s in scored])
    gains = np.array([(s.score - s.prompt_score) / unit.std for s in scored])
    for method, expected in {
        "terminal": totals,
        "uniform": totals,
        "abc": totals,
        "r3hf": gains,
        "segment": gains,
    }.items():
        np.testing.assert_allclose([credit.sum() for credit in paid[method]], expected, atol=1e-6, err_msg=method)


def test_attention_is_left_out_where_it_is_not_read(measured: tuple) -> None:
    judge, _, scored, unit = measured
    blind = [replace(s, attention=None) for s in scored]
    paid = credit_by_method(judge, blind, unit)
    assert "abc" not in paid and "r3hf" in paid


def test_oracle_is_exact_and_its_reverse_is_zero(measured: tuple) -> None:
    _, responses, *_ = measured
    golds = [response.gold for response in responses]
    rows = {row.method: row for row in measure_on_toy({"oracle": golds, "reversed": [-g for g in golds]}, responses)}
    assert rows["oracle"].phrase.auc.value == rows["oracle"].token.auc.value == 1.0
    assert rows["reversed"].phrase.auc.value == rows["reversed"].token.auc.value == 0.0
    assert rows["oracle"].phrase.pearson.value == pytest.approx(1.0)
    assert rows["oracle"].control and not rows["reversed"].control


def test_an_oracle_reward_model_gets_auc_1(measured: tuple, scored: Callable) -> None:
    """Prefix scores that are the sum of known credit so far: r3hf must recover the credit exactly."""
    judge, responses, *_ = measured
    perfect = [replace(scored(np.cumsum(response.gold).tolist()), answer=response.answer) for response in responses]
    unit = unit_of(perfect)
    paid = credit_by_method(judge, perfect, unit)
    rows = {row.method: row for row in measure_on_toy(with_toy_controls(paid, responses, seed=0), responses)}
    assert rows["r3hf"].token.auc.value == 1.0 and rows["r3hf"].phrase.auc.value == 1.0
    assert rows["uniform"].token.auc.value == 0.5  # every token the same, within a response
    assert all(bar.holds for bar in requirements(list(rows.values()), first_advantages(perfect, responses, unit)))


def test_first_advantages_obey_the_shaping_identity(measured: tuple) -> None:
    _, responses, scored, unit = measured
    found = first_advantages(scored, responses, unit)
    for lam in (0.95, 1.0):
        assert found["terminal, V = RM"][lam] == pytest.approx(found["r3hf, V = 0"][lam], abs=1e-9)
    assert found["oracle, V = 0"][0.95] > 0.6 > found["oracle, V = 0"][0.95] - 0.4


def test_a_random_reward_model_misses_its_bar_and_controls_keep_theirs(measured: tuple) -> None:
    judge, responses, scored, unit = measured
    paid = credit_by_method(judge, scored, unit)
    rows = measure_on_toy(with_toy_controls(paid, responses, seed=0), responses)
    bars = requirements(rows, first_advantages(scored, responses, unit))
    assert len(bars) == 5
    missed = [bar.sentence for bar in bars if not bar.holds]
    assert any("phrase AUC of r3hf" in sentence for sentence in missed)
    assert not any("oracle" in sentence for sentence in missed)


def bars_of(count: int, **areas: float) -> list[tuple[str, bool | None]]:
    """The bars of methods with these phrase areas, known to 0.05 either way, as (first words, holds)."""
    rows = []
    for method, area in ({"r3hf": 0.7, "oracle": 1.0, "uniform": 0.5, "terminal": 0.5} | areas).items():
        mean = Estimate(area, area - 0.05, area + 0.05, count)
        same = Agreement(auc=mean, pearson=mean, auc_pooled=area)
        rows.append(ToyMeasures(method=method, control=method == "oracle", phrase=same, token=same))
    advantages = {"r3hf, V = 0": {0.95: 0.66, 1.0: 0.6}, "terminal, V = 0": {0.95: 0.57, 1.0: 0.55}}
    return [(bar.sentence.partition(" is ")[0], bar.holds) for bar in requirements(rows, advantages)]


@pytest.mark.parametrize("method", ["uniform", "terminal"])
@pytest.mark.parametrize(("area", "holds"), [(0.4701, True), (0.469, False), (0.5299, True), (0.531, False)])
def test_methods_that_know_nothing_must_be_at_chance_themselves(method: str, area: float, holds: bool) -> None:
    """0.531 is known to 0.05 either way: an interval that overlaps 0.47 to 0.53 is not enough."""
    bars = dict(bars_of(400, **{method: area}))
    assert len(bars) == 5 and bars.pop(f"phrase AUC of {method}") is holds
    assert all(bars.values())


def test_few_responses_are_not_judged() -> None:
    assert [holds for _, holds in bars_of(ENOUGH_RESPONSES)] == [True] * 5
    assert [holds for _, holds in bars_of(ENOUGH_RESPONSES - 1)] == [None] * 5
    assert [holds for _, holds in bars_of(ENOUGH_RESPONSES - 1, r3hf=0.4, uniform=0.6)] == [None] * 5


def test_responses_come_from_a_policy_when_there_is_one(toy_world: Path) -> None:
    judge = load_judge(str(toy_world / "reward"))
    sampled = toy_responses(judge, str(toy_world / "base"), count=4, max_response_tokens=8, seed=0)
    assert all(isinstance(r, ToyResponse) and len(r.gold) == len(r.answer.response_ids) <= 8 for r in sampled)
    again = toy_responses(judge, str(toy_world / "base"), count=4, max_response_tokens=8, seed=0)
    assert [r.answer for r in sampled] == [r.answer for r in again]


def test_another_language_is_refused(tiny_models: object, byte_judge: object) -> None:
    with pytest.raises(ModelError, match="toy language"):
        toy_responses(byte_judge, None, count=1, max_response_tokens=8, seed=0)


def test_constant_credit_has_no_correlation(measured: tuple) -> None:
    _, responses, *_ = measured
    (row,) = measure_on_toy({"flat": [np.zeros_like(r.gold) for r in responses]}, responses)
    assert row.token.auc.value == 0.5 and math.isnan(row.token.pearson.value)


def test_credit_one_token_late_is_right_by_phrase(measured: tuple) -> None:
    """Facts and fillers whose credit lands on the stop behind them: chance by token, perfect by phrase."""
    judge, rng = measured[0], random.Random(0)
    text = "gardens grow . um . gardens age . well . <eos>"
    request = next(r for r in iter(lambda: make_request(rng), None) if r.text == "gardening no-slang casually")
    response = ToyResponse(
        request=request,
        answer=Answer([1], judge.tokenizer.encode(text, add_special_tokens=False)),
        gold=np.array(gold_credit(request.text, text)),
        phrases=np.array(phrase_ids(text)),
    )
    late = np.array([0, 0, 1, 0, -0.1, 0, 0, 1, 0, -0.1, 0.0])
    (row,) = measure_on_toy({"late": [late]}, [response])
    assert (row.token.auc.value, row.phrase.auc.value) == (0.5, 1.0)
    assert row.phrase.pearson.value == pytest.approx(1.0)


def test_token_rewards_are_differences_of_prefix_scores(toy_world: Path, measured: tuple) -> None:
    _, _, scored, unit = measured
    model = LlamaForSequenceClassification.from_pretrained(toy_world / "reward").eval()
    for one, reward in zip(scored[:7], r3hf_credit(scored[:7], unit), strict=True):
        ids = one.answer.prompt_ids + one.answer.response_ids
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
            prefixes = model.score(states)[0, :, 0].double().numpy()
        first = len(one.answer.prompt_ids) - 1
        assert reward * unit.std == pytest.approx(np.diff(prefixes[first:]), abs=1e-5)


def test_a_reward_model_and_a_policy_are_measured_from_their_folders(toy_world: Path) -> None:
    row = reward_model_agreement(str(toy_world / "reward"), str(toy_world / "base"), count=30, seed=1)
    assert row.method == "r3hf" and row.phrase.pearson.count > 20 and 0.0 < row.token.auc.value < 1.0
    assert abs(row.phrase.pearson.value) < 0.7, "an untrained reward model knows nothing"
