import inspect
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.advantages import gae
from r3hf_ray.algorithms.masking import last_token
from r3hf_ray.algorithms.redistribution import (
    FUNCTIONS,
    PrefixScores,
    abc,
    eos_jump,
    expected_sum,
    r3hf,
    redistribute,
    segment,
    settle_eos_jump,
    telescoping_error,
    terminal,
    uniform,
)
from r3hf_ray.algorithms.spans import entropy_ends, ngram_ends, sentence_ends
from r3hf_ray.methods import METHODS

OPTIONS = [
    {"mode": mode, "beta_c": beta_c, "subtract_prompt_score": subtract}
    for mode, beta_c, subtract in itertools.product(["terminal", "r3hf"], [0.0, 0.5, 1.0], [True, False])
]


def brute_force(scores, mask, *, mode, beta_c, subtract_prompt_score):
    """The definition, one token after the other."""
    prefix, prompt, pooled = scores.prefix.numpy(), scores.prompt.numpy(), scores.pooled.numpy()
    rewards = np.zeros(mask.shape)
    for b in range(len(mask)):
        tokens = np.flatnonzero(mask[b].numpy())
        before = prompt[b] if subtract_prompt_score else 0.0
        for t in tokens:
            is_last = t == tokens[-1]
            after = pooled[b] if is_last else prefix[b, t]
            sparse = pooled[b] if is_last else 0.0
            dense = sparse if mode == "terminal" else after - before
            rewards[b, t] = beta_c * dense + (1 - beta_c) * sparse
            before = after
    return rewards


def test_the_example_of_the_docstring():
    scores = PrefixScores(
        prefix=torch.tensor([[0, 0, 0.9, 1.7]]), prompt=torch.tensor([0.5]), pooled=torch.tensor([2.0])
    )
    mask = torch.tensor([[False, False, True, True]])
    torch.testing.assert_close(r3hf(scores, mask), torch.tensor([[0, 0, 0.4, 1.1]]))
    torch.testing.assert_close(terminal(scores, mask), torch.tensor([[0, 0, 0, 2.0]]))


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_definition_token_by_token(ragged, options):
    scores, mask = ragged()
    rewards = redistribute(scores, mask, **options)
    np.testing.assert_allclose(rewards, brute_force(scores, mask, **options), rtol=0, atol=1e-14)
    assert torch.equal(rewards[~mask], torch.zeros_like(rewards[~mask]))


@pytest.mark.parametrize("options", OPTIONS)
def test_telescopes_to_the_expected_sum(ragged, options):
    scores, mask = ragged()
    total = redistribute(scores, mask, **options).sum(1)
    torch.testing.assert_close(total, expected_sum(scores, **options), rtol=0, atol=1e-13)
    assert (telescoping_error(redistribute(scores, mask, **options), scores, mask, **options) < 1e-14).all()


@given(st.integers(0, 2**31), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=5))
def test_telescopes_in_float32_for_any_lengths(ragged, seed, lengths):
    scores, mask = ragged(seed, torch.float32, lengths)
    for options in OPTIONS:
        rewards = redistribute(scores, mask, **options)
        assert rewards.dtype == torch.float32
        assert (telescoping_error(rewards, scores, mask, **options) < 1e-5).all()


def test_expected_sums_are_the_documented_ones(ragged):
    scores, _ = ragged()
    score, prompt = scores.pooled, scores.prompt
    sums = {(o["mode"], o["beta_c"], o["subtract_prompt_score"]): expected_sum(scores, **o) for o in OPTIONS}
    for beta_c, subtract in itertools.product([0.0, 0.5, 1.0], [True, False]):
        torch.testing.assert_close(sums["terminal", beta_c, subtract], score)
        torch.testing.assert_close(sums["r3hf", beta_c, subtract], score - beta_c * subtract * prompt)


def test_the_template_jump_lands_on_the_last_token(ragged):
    scores, mask = ragged()
    jumped = replace(scores, pooled=scores.pooled + 10.0)
    difference = r3hf(jumped, mask) - r3hf(scores, mask)
    torch.testing.assert_close(difference, terminal(jumped, mask) - terminal(scores, mask))
    torch.testing.assert_close(difference.sum(1), torch.full((4,), 10.0, dtype=torch.float64))


def test_the_last_prefix_score_itself_is_not_read_but_replaced_by_the_pooled_one(ragged):
    scores, mask = ragged()
    other = scores.prefix.clone()
    other[0, 6] = 99.0  # the last token of row 0: prompt of 2, response of 5
    assert torch.equal(r3hf(replace(scores, prefix=other), mask), r3hf(scores, mask))


def test_the_prompt_score_touches_the_first_token_only(ragged):
    scores, mask = ragged()
    difference = r3hf(scores, mask, subtract_prompt_score=False) - r3hf(scores, mask)
    expected = torch.zeros_like(difference)
    for row, first in enumerate([2, 1, 4, 3]):
        expected[row, first] = scores.prompt[row]
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-14)


def test_a_constant_added_to_the_reward_model_cancels_and_its_scale_does_not(ragged):
    scores, mask = ragged()
    shifted = PrefixScores(prefix=scores.prefix + 7.0 * mask, prompt=scores.prompt + 7.0, pooled=scores.pooled + 7.0)
    torch.testing.assert_close(r3hf(shifted, mask), r3hf(scores, mask), rtol=0, atol=1e-13)
    assert not torch.allclose(terminal(shifted, mask), terminal(scores, mask))
    scaled = PrefixScores(prefix=2 * scores.prefix, prompt=2 * scores.prompt, pooled=2 * scores.pooled)
    torch.testing.assert_close(r3hf(scaled, mask), 2 * r3hf(scores, mask))


def test_a_hole_in_the_mask_pays_the_next_response_token_and_the_sum_stays_exact(ragged):
    scores, _ = ragged(lengths=((1, 4),))
    mask = torch.tensor([[False, True, True, False, True, False, False]])
    rewards = r3hf(scores, mask)
    torch.testing.assert_close(rewards[0, 4], scores.pooled[0] - scores.prefix[0, 2])
    assert rewards[0, 3] == 0
    torch.testing.assert_close(rewards.sum(), (scores.pooled - scores.prompt).sum())


def test_padding_is_never_read_and_an_empty_row_earns_nothing(ragged):
    scores, mask = ragged()
    junk = replace(scores, prefix=scores.prefix.masked_fill(~mask, float("nan")))
    for options in OPTIONS:
        rewards = redistribute(junk, mask, **options)
        assert torch.equal(rewards, redistribute(scores, mask, **options))
        assert torch.equal(
            telescoping_error(rewards, junk, mask, **options), telescoping_error(rewards, scores, mask, **options)
        )
        nothing = redistribute(junk, torch.zeros_like(mask), **options)
        assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("options", [o for o in OPTIONS if o["mode"] == "r3hf" and o["beta_c"] > 0])
def test_the_telescoping_error_sees_the_mistakes_it_is_there_for(ragged, options):
    scores, mask = ragged()
    rewards = redistribute(scores, mask, **options)
    cut = rewards.clone()
    cut[:, -3] = 0.0  # the last token of the longest row
    clipped = rewards.clamp(-0.5, 0.5)
    for wrong in (cut, clipped, rewards + 0.1 * mask):
        assert telescoping_error(wrong, scores, mask, **options).max() > 1e-2


def test_one_models_steps_carry_the_others_reward(ragged) -> None:
    own, mask = ragged()
    other, _ = ragged(seed=1)
    carried = own.carried_by(other, mask)
    rewards, steps = r3hf(carried, mask), r3hf(other, mask)
    last = last_token(mask)
    torch.testing.assert_close(rewards.masked_fill(last, 0.0), steps.masked_fill(last, 0.0))
    torch.testing.assert_close(rewards.sum(1), own.pooled - own.prompt)
    same = own.carried_by(own, mask)
    torch.testing.assert_close(r3hf(same, mask), r3hf(own, mask))


def test_unknown_names_are_refused_with_the_choices(ragged):
    scores, mask = ragged()
    for function in (
        lambda: redistribute(scores, mask, mode="sparse", beta_c=1.0, subtract_prompt_score=True),
        lambda: expected_sum(scores, mode="sparse", beta_c=1.0, subtract_prompt_score=True),
    ):
        with pytest.raises(ValueError, match="no redistribution method 'sparse'; choose one of r3hf, segment"):
            function()
    with pytest.raises(ValueError, match="choose keep, spread or drop"):
        settle_eos_jump(scores, mask, torch.ones(4, dtype=torch.bool), rule="pay")


@pytest.mark.parametrize("mode", METHODS)
def test_every_function_is_what_its_facts_say(ragged, mode):
    scores, mask = ragged()
    facts, method = METHODS[mode], bound(mask)[mode]
    rewards = method(scores, mask)
    total = scores.pooled - scores.prompt if facts.total == "R - P_0" else scores.pooled
    torch.testing.assert_close(rewards.sum(1), total, rtol=0, atol=1e-13)
    parameters = inspect.signature(FUNCTIONS[mode]).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty} == set(facts.needs)
    other = method(replace(scores, prefix=scores.prefix + torch.randn_like(scores.prefix) * mask), mask)
    assert facts.reads_prefixes == (not torch.equal(other, rewards))
    doubled = method(replace(scores, pooled=2 * scores.pooled, prompt=scores.prompt + 1.0), mask)
    shares = torch.allclose(doubled, 2 * rewards) and not torch.equal(rewards, terminal(scores, mask))
    assert facts.pays_shares == shares


@pytest.mark.parametrize("mode", METHODS)
def test_a_potential_is_a_function_of_what_has_happened_and_leaves_every_advantage(ragged, mode):
    """A token before the last is paid the same whatever comes; then gae(rewards, V - Phi) is gae(terminal, V)."""
    scores, mask = ragged()
    method = bound(mask)[mode]
    rewards, late = method(scores, mask), mask & (mask.cumsum(1) > 3)
    changed = replace(scores, prefix=scores.prefix + 3.0 * late, pooled=scores.pooled + 5.0)
    early = mask & ~late & ~last_token(mask)
    assert METHODS[mode].potential_based == torch.allclose(method(changed, mask)[early], rewards[early])
    if METHODS[mode].potential_based:
        paid_before = rewards.cumsum(1) - rewards
        start = scores.prompt if METHODS[mode].total == "R - P_0" else torch.zeros_like(scores.prompt)
        potential = (start[:, None] + paid_before).masked_fill(~mask, 0.0)
        values = torch.randn_like(rewards) * mask
        ours, _ = gae(rewards, values - potential, mask, gamma=1.0, lam=0.9)
        theirs, _ = gae(terminal(scores, mask), values, mask, gamma=1.0, lam=0.9)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_facts_and_functions_have_the_same_names():
    assert METHODS.keys() == FUNCTIONS.keys()


def bound(mask, seed=9):
    """Every method with random evidence: attention everywhere, span ends where it happens."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    ends = torch.rand(mask.shape, generator=generator) < 0.3
    return FUNCTIONS | {"abc": partial(abc, attention=attention), "segment": partial(segment, span_ends=ends)}


@pytest.mark.parametrize("mode", METHODS)
@pytest.mark.parametrize("rule", ["keep", "spread", "drop"])
@pytest.mark.parametrize(("beta_c", "subtract"), itertools.product([0.3, 1.0], [True, False]))
def test_every_method_telescopes_in_float32_under_every_rule_for_the_jump(ragged, mode, rule, beta_c, subtract):
    options = {"mode": mode, "beta_c": beta_c, "subtract_prompt_score": subtract}
    scores, mask = ragged(dtype=torch.float32)
    settled = settle_eos_jump(scores, mask, torch.tensor([True, True, False, True]), rule=rule)
    rewards = redistribute(settled, mask, **options, method=bound(mask)[mode])
    assert rewards.dtype == torch.float32
    assert (telescoping_error(rewards, settled, mask, **options) < 1e-6).all()
    assert not rewards[~mask].any()


def test_uniform_pays_every_token_the_same(ragged):
    scores, mask = ragged()
    rewards = uniform(scores, mask)
    assert torch.equal(rewards[0, 2:7], (scores.pooled[0] / 5).expand(5))
    assert rewards[1, 1] == scores.pooled[1]


def test_abc_pays_by_attention_renormalised_over_the_response():
    scores = PrefixScores(prefix=torch.zeros(2, 4), prompt=torch.tensor([0.5, 0.5]), pooled=torch.tensor([2.0, -3.0]))
    mask = torch.tensor([[False, True, True, True], [False, False, True, True]])
    attention = torch.tensor([[0.6, 0.1, 0.1, 0.2], [0.9, 0.1, 0.0, 0.0]])
    torch.testing.assert_close(
        abc(scores, mask, attention=attention), torch.tensor([[0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 0.0, -3.0]])
    )
    mixed = redistribute(
        scores, mask, mode="abc", beta_c=0.8, subtract_prompt_score=True, method=partial(abc, attention=attention)
    )
    torch.testing.assert_close(mixed[0], torch.tensor([0.0, 0.4, 0.4, 0.8 + 0.4]))


def test_segment_is_r3hf_summed_over_spans_and_paid_at_their_last_tokens(ragged):
    scores, mask = ragged()
    tokens = r3hf(scores, mask)
    for ends in (ngram_ends(mask, length=2), ngram_ends(mask, length=4), bound(mask)["segment"].keywords["span_ends"]):
        paid = segment(scores, mask, span_ends=ends)
        for b in range(len(mask)):
            held = 0.0
            for t in mask[b].nonzero().flatten().tolist():
                held = held + tokens[b, t]
                is_end = bool(ends[b, t]) or not mask[b, t + 1 :].any()
                assert paid[b, t] == pytest.approx(float(held) if is_end else 0.0, abs=1e-14)
                held = 0.0 if is_end else held
    assert torch.equal(segment(scores, mask, span_ends=mask), tokens)
    whole = terminal(replace(scores, pooled=scores.pooled - scores.prompt), mask)
    torch.testing.assert_close(segment(scores, mask, span_ends=torch.zeros_like(mask)), whole, rtol=0, atol=1e-14)


def test_where_spans_end():
    mask = torch.tensor([[False, True, True, True, True, True, False]])
    token_ids = torch.tensor([[9, 5, 9, 5, 6, 5, 9]])
    last_only = [[False, False, False, False, False, True, False]]
    assert sentence_ends(token_ids, mask, end_ids=torch.tensor([9, 6])).tolist() == [
        [False, False, True, False, True, True, False]
    ]
    assert ngram_ends(mask, length=2).tolist() == [[False, False, True, False, True, True, False]]
    assert ngram_ends(mask, length=99).tolist() == last_only
    # token 4 was drawn from a wide distribution: the span before it ends at token 3
    entropy = torch.tensor([[9.0, 9.0, 0.1, 0.2, 2.0, 1.0, 9.0]])
    assert entropy_ends(entropy, mask, threshold=1.5).tolist() == [[False, False, False, True, False, True, False]]
    assert entropy_ends(entropy, mask, threshold=float("inf")).tolist() == last_only
    assert torch.equal(entropy_ends(entropy, mask, threshold=0.0), mask)


def test_the_jump_at_eos_is_kept_spread_or_dropped_on_finished_responses_only(ragged):
    scores, mask = ragged()
    finished = torch.tensor([True, True, False, True])
    kept, jump = r3hf(scores, mask), eos_jump(scores, mask)
    lasts = [6, 1, 6, 11]
    assert torch.equal(jump, kept[range(4), lasts])
    assert settle_eos_jump(scores, mask, finished, rule="keep") is scores
    spread = r3hf(settle_eos_jump(scores, mask, finished, rule="spread"), mask)
    dropped = r3hf(settle_eos_jump(scores, mask, finished, rule="drop"), mask)
    for b, length in enumerate([5, 1, 3, 9]):
        if not finished[b]:
            assert torch.equal(spread[b], kept[b]) and torch.equal(dropped[b], kept[b])
            continue
        expected = kept[b].clone()
        expected[lasts[b]] = 0.0
        torch.testing.assert_close(dropped[b], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(spread[b], expected + jump[b] / length * mask[b], rtol=0, atol=1e-14)
    torch.testing.assert_close(spread.sum(1), kept.sum(1))
    torch.testing.assert_close(dropped.sum(1), kept.sum(1) - jump * finished)


def test_a_users_own_method_is_mixed_masked_and_only_asked_to_be_finite(ragged):
    scores, mask = ragged()
    options = {"mode": "mine:every_other", "beta_c": 0.5, "subtract_prompt_score": False}

    def own(scores, response_mask):
        assert not scores.prompt.any()
        return torch.full(response_mask.shape, 3.0)

    rewards = redistribute(scores, mask, **options, method=own)
    torch.testing.assert_close(rewards, 1.5 * mask + 0.5 * terminal(scores, mask))
    assert telescoping_error(rewards, scores, mask, **options).tolist() == [0.0] * 4
    rewards[2, 5] = float("inf")
    assert telescoping_error(rewards, scores, mask, **options).isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"mine:every_other gives rewards of shape \[4\], not \[4, 14\]"):
        redistribute(scores, mask, **options, method=lambda scores, mask: scores.pooled)
