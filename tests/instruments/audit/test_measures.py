import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from r3hf_ray.errors import ModelError
from r3hf_ray.instruments.audit.advice import ENOUGH_PAIRS, advise
from r3hf_ray.instruments.audit.measures import Audit, audit_numbers, score_after
from r3hf_ray.instruments.pages.intervals import Estimate, mean_interval, share, share_above_zero


def test_wilson_interval() -> None:
    found = share(72.0, 100)
    assert (found.value, found.count) == (0.72, 100)
    # Newcombe (1998): 81 of 263 has the score interval 0.2553 to 0.3662.
    known = share(81.0, 263)
    assert (known.low, known.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert share(0.0, 10).low == 0.0 and share(10.0, 10).high == pytest.approx(1.0)
    assert math.isnan(share(0.0, 0).value) and (share(0.0, 0).low, share(0.0, 0).high) == (0.0, 1.0)
    assert share_above_zero([1.0, -1.0, 0.0, 0.0]).value == 0.5


def test_mean_interval_leaves_unknown_values_out() -> None:
    mean = mean_interval([1.0, float("nan"), 3.0])
    assert (mean.value, mean.count) == (2.0, 2)
    assert mean_interval([float("nan")]).count == 0


def test_score_after_a_part(scored: Callable) -> None:
    answer = scored([float(t) for t in range(1, 8)], prompt_score=-1.0, score=9.0)
    assert [score_after(answer, part) for part in (0, 1, 5, 9, 10)] == [-1.0, 1.0, 4.0, 7.0, 9.0]


def test_numbers_of_known_pairs(scored: Callable) -> None:
    # 10 tokens each; the chosen answer goes ahead at token 6, the end token adds 2 to both.
    ahead = [0.0] * 5 + [1.0] * 4 + [3.0]
    behind = [0.0] * 9 + [2.0]
    audit = audit_numbers([(scored(ahead), scored(behind))] * 20)
    assert audit.accuracy.value == 1.0 and audit.pairs == 20 and audit.mean_tokens == 10.0
    assert [place.agrees.value for place in audit.places] == [0.5] * 6 + [1.0] * 5
    assert audit.score_mean == 2.5 and audit.score_std == 0.5
    assert audit.places[-2].drift == pytest.approx(0.5 / 0.5) and audit.places[-1].drift == pytest.approx(2.5 / 0.5)
    # |r| is 1 + 2 for the chosen and 2 for the other answer; the end token has 2 of each.
    assert audit.abs_credit == pytest.approx(2.5 / 0.5)
    assert audit.ending.share == pytest.approx(4 / 5) and audit.ending.mean == pytest.approx(2 / 0.5)
    assert audit.credit_by_part[5] == pytest.approx(1 / 5) and sum(audit.credit_by_part) == pytest.approx(1 / 5)
    assert audit.prompt_offset == 0.0 and audit.first_share == 0.0 and audit.telescoping_error < 1e-12
    assert audit.ending.template_share == 0.0


def test_template_text_belongs_to_the_end_token(scored: Callable) -> None:
    audit = audit_numbers([(scored([1.0, 1.0], score=3.0), scored([0.0, 0.0], score=1.0))] * 3)
    assert audit.ending.share == pytest.approx(3 / 4) and audit.ending.template_share == pytest.approx(3 / 4)
    cut = audit_numbers([(scored([1.0, 3.0], finished=False), scored([0.0, 1.0], finished=False))] * 3)
    assert cut.ending.share == 0.0 and math.isnan(cut.ending.mean) and cut.ending.finished == 0.0


def test_a_model_that_likes_length(scored: Callable) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(60):
        first, second = ([float(t) for t in range(1, int(length) + 1)] for length in rng.integers(2, 40, size=2))
        pairs.append((scored(first), scored(second)))
    length = audit_numbers(pairs).length
    assert length.correlation == pytest.approx(1.0) and length.difference_correlation == pytest.approx(1.0)
    assert length.longer_preferred.value == 1.0 and length.longer_chosen.high < 0.8


def test_a_model_that_tells_nothing_apart_is_refused(scored: Callable) -> None:
    with pytest.raises(ModelError, match="same score"):
        audit_numbers([(scored([1.0]), scored([1.0]))])


@pytest.fixture
def good(scored: Callable) -> Audit:
    """A model that ranks 80% of 400 pairs and is ahead evenly all along."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(400):
        steps = rng.normal(size=(2, 30))
        steps[0] += 0.22
        pairs.append(tuple(scored(np.cumsum(side).tolist()) for side in steps))
    return audit_numbers(pairs)


def agreeing(value: float, count: int = 400) -> Estimate:
    return share(value * count, count)


def at_half(audit: Audit, value: float) -> Audit:
    places = list(audit.places)
    places[5] = replace(places[5], agrees=agreeing(value))
    return replace(audit, places=tuple(places))


def test_verdict_likely(good: Audit) -> None:
    found = advise(good)
    assert found.signal == "likely", found.sentence
    assert (found.mode, found.critic_init, found.gae_lambda) == ("r3hf", "reward_trunk", 0.95)
    assert found.sentence.count(". ") == 0 and found.sentence.endswith("ppo.gae_lambda = 0.95.")
    assert good.noise == pytest.approx(1.0, abs=0.15)  # independent steps
    assert advise(replace(good, mean_tokens=51.0)).gae_lambda == 1.0


def test_verdict_weak_says_why(good: Audit) -> None:
    even = at_half(replace(good, accuracy=agreeing(0.75)), 0.75)
    assert advise(at_half(even, 0.62)).signal == "weak"
    assert "48% of its final lead" in advise(at_half(even, 0.62)).sentence
    for doubtful, words in (
        (replace(even, noise=4.6), "4.6 times"),
        (replace(even, ending=replace(even.ending, share=0.51)), "51% of all credit falls on the end token"),
    ):
        found = advise(doubtful)
        assert (found.signal, found.mode, found.critic_init) == ("weak", "terminal", "reward_model")
        assert words in found.sentence
    assert advise(replace(even, noise=4.5)).signal == "likely"


def test_verdict_without_early_signal(good: Audit) -> None:
    found = advise(at_half(replace(good, accuracy=agreeing(0.75)), 0.54))
    assert (found.signal, found.mode, found.critic_init, found.gae_lambda) == (
        "unlikely",
        "terminal",
        "reward_trunk",
        1.0,
    )


def test_verdict_on_a_model_that_does_not_rank(good: Audit) -> None:
    assert advise(replace(good, accuracy=agreeing(0.52))).signal == "none"
    few = replace(good, accuracy=agreeing(0.6, 30), pairs=30)
    assert advise(few).signal == "unknown" and "too few" in advise(few).sentence
    assert advise(replace(few, pairs=ENOUGH_PAIRS)).signal == "none"


def test_notes(good: Audit) -> None:
    assert advise(replace(good, prompt_offset=0.4)).notes == advise(good).notes
    length = replace(good.length, longer_preferred=agreeing(0.7), longer_chosen=agreeing(0.5))
    notes = advise(replace(good, prompt_offset=1.1, length=length)).notes
    assert any("subtract_prompt_score" in note for note in notes)
    assert any("70% of the pairs, people in 50%" in note for note in notes)
