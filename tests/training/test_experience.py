"""Every way to credit a token, from a scored batch to the losses' inputs, on one rank and on two."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from r3hf_ray.algorithms.batching import Batch, collate
from r3hf_ray.algorithms.scaling import missing_eos, normalize
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import DivergenceError, TelescopingError
from r3hf_ray.models.sharding import make_mesh
from r3hf_ray.records.metrics import describe
from r3hf_ray.training.divergence import replay_capsule
from r3hf_ray.training.experience import RewardScale, Seen, make_experience, require_telescoping
from r3hf_ray.training.ppo import PPOLearner
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory, Trajectory

SHAPES = [(2, 4), (2, 6), (2, 3), (3, 5), (3, 1), (3, 7)]
"""Prompt and response lengths: three samples of each of two prompts. The last response is cut."""


def scored(index: int) -> ScoredTrajectory:
    prompt_len, length = SHAPES[index]
    rng = np.random.default_rng(index)

    def per_token(mean: float, std: float) -> np.ndarray:
        return np.concatenate([np.zeros(prompt_len), rng.normal(mean, std, length)]).astype(np.float32)

    prefix, prompt_score = per_token(1.0, 1.0), 0.5 if index < 3 else -0.25
    rewards = np.zeros_like(prefix)
    rewards[prompt_len:] = np.diff(prefix[prompt_len:], prepend=np.float32(prompt_score))
    trajectory = Trajectory(
        prompt_id=index // 3,
        sample=index % 3,
        attempt=0,
        policy_version=0,
        prompt_len=prompt_len,
        finish=Finish.LENGTH if index == 5 else Finish.EOS,
        token_ids=rng.integers(3, 40, prompt_len + length).astype(np.int32),
        behavior_logprobs=per_token(-3.7, 0.3),
    )
    main = ModelScores(token_rewards=rewards, prefix_scores=prefix, score=float(prefix[-1]), prompt_score=prompt_score)
    return ScoredTrajectory(trajectory=trajectory, ref_logprobs=per_token(-3.7, 0.3), by_model={MAIN: main})


ALL = [scored(index) for index in range(6)]


def changed(item: ScoredTrajectory, **change) -> ScoredTrajectory:
    """The same with other scores of the main model."""
    return replace(item, by_model=item.by_model | {MAIN: replace(item.main, **change)})


def configuration(**sections) -> PPOConfig:
    given = {
        "run": {"name": "test"},
        "model": {"policy": "p", "reward_model": "r"},
        "data": {"source": "none"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 3},
        "cost": {"limit": 0.0},
    }
    return PPOConfig(**{name: given.get(name, {}) | sections.get(name, {}) for name in given.keys() | sections.keys()})


def seen(batch: Batch) -> Seen:
    gap = 0.25 * batch.response_mask
    return batch.ref_logprobs + gap, gap, torch.zeros_like(gap)


def experience(config: PPOConfig, items=ALL, *, kl_coef=0.0, mean=0.0, scale=1.0, further=None, multiplier=0.0):
    batch = collate(items, pad_id=0)
    error = torch.zeros(len(items))
    scales = {"reward": RewardScale(mean, scale), **(further or {})}
    return make_experience(batch, seen(batch), error, config, scales=scales, kl_coef=kl_coef, multiplier=multiplier)


def wholes(exp) -> list[float]:
    return exp.total_rewards.sum(1).tolist()


def test_r3hf_baseline_is_gae_with_a_zero_critic_and_lambda_1():
    free = experience(configuration(ppo={"advantage": "r3hf_baseline"}), kl_coef=0.1)
    critic = experience(configuration(ppo={"gae_lambda": 1.0}), kl_coef=0.1)
    torch.testing.assert_close(free.advantages, critic.advantages)
    torch.testing.assert_close(free.returns, free.advantages)


def test_rloo_takes_the_others_of_the_prompt_with_kl_and_missing_eos():
    sections = {"ppo": {"advantage": "rloo"}, "reward": {"missing_eos": "penalty", "missing_eos_penalty": 2.0}}
    exp = experience(configuration(**sections), kl_coef=0.1)
    whole = wholes(exp)
    assert whole[5] == pytest.approx(ALL[5].main.score + 0.25 - 2.0 - 0.1 * 0.25 * 7, abs=1e-5)
    first = exp.batch.response_mask & (exp.batch.response_mask.cumsum(1) == 1)
    others = [(sum(whole[:3]) - w) / 2 for w in whole[:3]] + [(sum(whole[3:]) - w) / 2 for w in whole[3:]]
    np.testing.assert_allclose(exp.advantages[first], np.subtract(whole, others), rtol=0, atol=1e-5)


def test_grpo_standardises_by_the_prompt():
    exp = experience(configuration(ppo={"advantage": "grpo"}), scale=0.1)
    first = exp.batch.response_mask & (exp.batch.response_mask.cumsum(1) == 1)
    groups = np.array(wholes(exp)).reshape(2, 3)
    expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    np.testing.assert_allclose(exp.advantages[first], expected.ravel(), rtol=1e-4, atol=1e-5)


def test_a_prompts_offset_in_the_reward_model_is_nothing_to_groups():
    """P_0 cancels in r3hf; where terminal rewards carry it, the group's mean takes it away."""
    moved = [changed(item, score=item.main.score + 10.0 * (i < 3)) for i, item in enumerate(ALL)]
    config = configuration(ppo={"advantage": "rloo"}, reward={"mode": "terminal"})

    def sparse(items):
        paid = [np.zeros_like(item.main.token_rewards) for item in items]
        for rewards, item in zip(paid, items, strict=True):
            rewards[-1] = item.main.score
        return [changed(item, token_rewards=rewards) for item, rewards in zip(items, paid, strict=True)]

    one, other = (experience(config, sparse(items)).advantages for items in (ALL, moved))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_kl_in_the_loss_leaves_the_reward_alone_and_carries_its_price():
    config = configuration(ppo={"kl_in": "loss"})
    exp = experience(config, kl_coef=0.3)
    assert torch.equal(exp.total_rewards, exp.rewards)
    torch.testing.assert_close(exp.kl_price, 0.3 * exp.batch.response_mask)
    assert not exp.filler().batch.response_mask.any()
    assert not experience(configuration(), kl_coef=0.3).kl_price.any()


@pytest.mark.parametrize(("estimator", "price"), [("k1", 0.25), ("k2", 0.25**2 / 2), ("k3", np.exp(-0.25) - 0.75)])
def test_kl_in_the_reward_takes_the_estimator(estimator, price):
    exp = experience(configuration(ppo={"kl_estimator": estimator}), kl_coef=1.0)
    paid = (exp.rewards - exp.total_rewards)[exp.batch.response_mask]
    torch.testing.assert_close(paid, torch.full_like(paid, price), rtol=0, atol=1e-5)


def test_uniform_rewards_are_centred_by_shares():
    items = []
    for item in ALL:
        rewards = np.zeros_like(item.main.token_rewards)
        rewards[item.trajectory.prompt_len :] = item.main.score / (len(rewards) - item.trajectory.prompt_len)
        items.append(changed(item, token_rewards=rewards))
    config = configuration(reward={"mode": "uniform"})
    assert require_telescoping(collate(items, pad_id=0), config).max() < 1e-6
    exp = experience(config, items, mean=0.7, scale=2.0)
    for row, (item, (prompt, length)) in enumerate(zip(items, SHAPES, strict=True)):
        paid = exp.rewards[row, prompt : prompt + length]
        torch.testing.assert_close(
            paid, torch.full((length,), (item.main.score - 0.7) / 2.0 / length), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("rule", ["keep", "spread", "drop"])
def test_the_learner_knows_what_the_rule_for_the_jump_sums_to(rule):
    config = configuration(reward={"eos_jump": rule})
    error = require_telescoping
    items = []
    for item in ALL:
        start, rewards = item.trajectory.prompt_len, item.main.token_rewards.copy()
        if item.trajectory.finish is Finish.EOS and rule != "keep":
            jump, rewards[-1] = rewards[-1], 0.0
            rewards[start:] += jump / len(rewards[start:]) if rule == "spread" else 0.0
        items.append(changed(item, token_rewards=rewards))
    assert error(collate(items, pad_id=0), config).max() < 1e-6
    if rule == "drop":
        with pytest.raises(TelescopingError):
            error(collate(items, pad_id=0), configuration())


# ---------------------------------------------------------------------------------------------- several models

SEVERAL = {
    "policy": "p",
    "reward_model": "r",
    "reward_weight": 0.5,
    "rewards": [{"name": "brevity", "source": "b", "weight": -2.0}],
    "cost": "c",
}
SCALES = {"brevity": RewardScale(1.0, 4.0), "cost": RewardScale(-2.0, 0.5)}


def opinion(item: ScoredTrajectory, seed: int, mode: str) -> ModelScores:
    """Another model's opinion of the same response, redistributed by `mode`."""
    start, rng = item.trajectory.prompt_len, np.random.default_rng((seed, *item.trajectory.token_ids))
    prefix = np.zeros_like(item.main.prefix_scores)
    prefix[start:] = rng.normal(seed, 2.0, len(prefix) - start)
    prompt_score, score, rewards = float(np.float32(rng.normal())), float(prefix[-1]), np.zeros_like(prefix)
    if mode == "r3hf":
        rewards[start:] = np.diff(prefix[start:], prepend=np.float32(prompt_score))
    elif mode == "terminal":
        rewards[-1] = score
    else:
        rewards[start:] = score / (len(prefix) - start)
    return ModelScores(token_rewards=rewards, prefix_scores=prefix, score=score, prompt_score=prompt_score)


def judged_by_several(mode: str = "r3hf") -> list[ScoredTrajectory]:
    items = []
    for item in ALL:
        names = ("reward", "brevity", "cost")
        items.append(replace(item, by_model={name: opinion(item, seed, mode) for seed, name in enumerate(names)}))
    return items


@pytest.mark.parametrize("mode", ["r3hf", "terminal", "uniform"])
def test_the_reward_is_the_weighted_sum_each_in_its_own_units(mode):
    """0.5 (R - 0.5) / 2 - 2 (B - 1) / 4 - 3 (C + 2) / 0.5, in r3hf without the centres, which cancel."""
    items, config = judged_by_several(mode), configuration(model=SEVERAL, reward={"mode": mode})
    assert require_telescoping(collate(items, pad_id=0), config).max() < 1e-6
    exp = experience(config, items, mean=0.5, scale=2.0, further=SCALES, multiplier=3.0)
    factors = {"reward": (0.5, 0.5, 2.0), "brevity": (-2.0, 1.0, 4.0), "cost": (-3.0, -2.0, 0.5)}
    assert list(exp.parts) == list(factors)
    whole = np.zeros(len(items))
    for row, (item, (prompt_len, length)) in enumerate(zip(items, SHAPES, strict=True)):
        expected = np.zeros(prompt_len + length)
        for name, (weight, mean, std) in factors.items():
            part = opinion(item, ["reward", "brevity", "cost"].index(name), mode)
            paid = part.token_rewards.astype(np.float64)
            if mode == "terminal":
                paid[-1] -= mean
            elif mode == "uniform":
                paid[prompt_len:] -= mean / length
            own = exp.parts[name][row, : len(paid)]
            np.testing.assert_allclose(own, weight * paid / std, rtol=1e-4, atol=1e-5)
            expected += weight * paid / std
            whole[row] += weight * (part.score - (part.prompt_score if mode == "r3hf" else mean)) / std
        np.testing.assert_allclose(exp.rewards[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert not exp.rewards[row, len(expected) :].any()
    np.testing.assert_allclose(exp.rewards.sum(1), whole, rtol=1e-4, atol=1e-4)


def test_a_cost_that_is_the_reward_cancels_it():
    models = {"policy": "p", "reward_model": "r", "reward_weight": 0.5, "cost": "r"}
    items = [replace(item, by_model={MAIN: item.main, "cost": item.main}) for item in judged_by_several()]
    exp = experience(
        configuration(model=models), items, scale=2.0, further={"cost": RewardScale(0.0, 2.0)}, multiplier=0.5
    )
    assert exp.parts["cost"].abs().sum() > 1.0 and not exp.rewards.any()


def test_one_model_is_what_it_was_to_the_bit():
    """The sum over a single model adds and multiplies by nothing."""
    reward = {"missing_eos": "penalty", "beta_c": 0.75}
    exp = experience(configuration(reward=reward), mean=0.7, scale=1.3, multiplier=5.0)
    batch = exp.batch
    alone = normalize(batch.main.token_rewards, batch.response_mask, mean=0.7, scale=1.3, terminal_weight=0.25)
    alone = missing_eos(alone, batch.response_mask, batch.truncated, rule="penalty", penalty=1.0)
    assert alone.numpy().tobytes() == exp.rewards.numpy().tobytes()
    assert list(exp.parts) == ["reward"]


def test_a_weight_or_multiplier_of_0_only_logs():
    models = SEVERAL | {"reward_weight": 1.0, "rewards": [{"name": "brevity", "source": "b", "weight": 0.0}]}
    items = judged_by_several()
    several = experience(configuration(model=models), items, scale=2.0, further=SCALES)
    alone = experience(configuration(), [replace(item, by_model={MAIN: item.main}) for item in items], scale=2.0)
    assert torch.equal(several.rewards, alone.rewards)


def test_a_missing_eos_is_fined_once():
    items, models = judged_by_several(), {"model": SEVERAL}
    rules = {"missing_eos": "penalty", "missing_eos_penalty": 2.0}
    kept, fined = (
        experience(configuration(**models, reward=reward), items, further=SCALES, multiplier=3.0)
        for reward in ({}, rules)
    )
    difference = kept.rewards - fined.rewards
    assert difference.sum(1).tolist() == pytest.approx([0, 0, 0, 0, 0, 2.0], abs=1e-5)
    assert difference[5, 9] == pytest.approx(2.0, abs=1e-5)


def test_every_model_must_add_up():
    items, config = judged_by_several(), configuration(model=SEVERAL)
    items[3].by_model["cost"].token_rewards[-1] += 0.01
    with pytest.raises(TelescopingError, match=r"prompt 1 \(cost\) by "):
        require_telescoping(collate(items, pad_id=0), config)


def test_a_model_that_did_not_score_is_missed():
    with pytest.raises(ValueError, match="models are reward, brevity, cost, but responses were scored by reward"):
        experience(configuration(model=SEVERAL), ALL, further=SCALES)


# ---------------------------------------------------------------------------------------------- the whole learner

PLANS = [[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]]
UNLIKE = ("time/", "perf/padding")
"""Metrics in which one rank and two may differ: their microbatches are others."""
RANKS = [[0, 2, 3, 5], [1, 4]]
VARIANTS = [
    {"ppo": {"advantage": "rloo"}},
    {"ppo": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3"}},
    {"ppo": {"advantage": "reinforce_pp", "loss_aggregation": "sequence_sum"}},
    {"ppo": {"kl_in": "loss", "loss_aggregation": "sequence_sum", "dual_clip": 3.0, "clip_range_high": 0.3}},
    {"model": SEVERAL, "cost": {"limit": 1.0, "multiplier_lr": 0.2}},
]


def learner(tiny_models, mesh=None, capsules=None, **sections):
    folders = {"policy": str(tiny_models.tied), "reward_model": str(tiny_models.reward)}
    config = configuration(**sections | {"model": sections.get("model", {}) | folders})
    ppo = PPOLearner(config, scale=RewardScale(0.2, 1.5), device="cpu", mesh=mesh, capsules=capsules)
    for name in config.model.weights(0.0).keys() & SCALES.keys():
        ppo.set_scale(SCALES[name], name)
    return ppo


def trained(tiny_models, rank=0, world=1, **sections):
    """Two updates; metrics without times and what the parts of a batch look like, and the policy."""
    ppo = learner(tiny_models, make_mesh(2, "cpu") if world == 2 else None, **sections)
    rows, items = RANKS[rank] if world == 2 else range(6), judged_by_several() if "model" in sections else ALL
    plans = [[plan[i] for i in rows] for plan in PLANS]
    metrics = [ppo.update([items[i] for i in rows], minibatch_of=plans) for _ in range(2)]
    policy = {name: x.numpy().copy() for name, x in ppo.full_parameters()}
    return [{k: v for k, v in row.items() if not k.startswith(UNLIKE)} for row in metrics], policy, ppo.critic is None


@pytest.mark.parametrize("sections", VARIANTS, ids=str)
def test_two_ranks_give_the_same_step_as_one(tiny_models, run_ranks, sections):
    """Samples of a prompt lie on different ranks."""
    alone, policy, no_critic = trained(tiny_models, **sections)
    assert no_critic == ("advantage" in sections.get("ppo", {}))
    assert not [name for name in alone[0] if name.startswith(("critic/loss", "critic/explained"))] or not no_critic
    assert not [name for name in alone[0] if "catalogue" in describe(name).meaning]
    for metrics, weights, _ in run_ranks(lambda rank: trained(tiny_models, rank, 2, **sections)):
        for mine, theirs in zip(metrics, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)
        for name, x in policy.items():
            np.testing.assert_allclose(weights[name], x, rtol=0, atol=2e-6, err_msg=name)


def test_sequence_sum_is_token_mean_times_the_mean_length(tiny_models):
    """One minibatch: only the scale of the loss and its gradient differ."""
    losses = {}
    for aggregation in ("token_mean", "sequence_sum"):
        sections = {"epochs": 1, "minibatches": 1, "loss_aggregation": aggregation, "gae_lambda": 1.0}
        ppo = learner(tiny_models, ppo=sections | {"kl_in": "loss", "whiten_advantages": False})
        losses[aggregation] = ppo.update(ALL, minibatch_of=[[0] * 6])
    length = np.mean([response for _, response in SHAPES])
    for name in ("policy/loss", "policy/grad_norm"):
        assert losses["sequence_sum"][name] == pytest.approx(losses["token_mean"][name] * length, rel=1e-4)
    for name in ("policy/kl_loss", "critic/loss"):
        assert losses["sequence_sum"][name] == pytest.approx(losses["token_mean"][name], rel=1e-5)


def test_the_price_of_cost_follows_its_limit_and_a_checkpoint_keeps_it(tiny_models, tmp_path):
    items, sections = judged_by_several(), {"model": SEVERAL, "cost": {"limit": 1.0, "multiplier_lr": 0.25}}
    ppo = learner(tiny_models, **sections)
    metrics = ppo.update(items, minibatch_of=PLANS)
    for name, place in (("brevity", "reward/brevity/score"), ("cost", "cost/score")):
        scores = np.array([item.by_model[name].score for item in items])
        assert metrics[f"{place}/mean"] == pytest.approx(scores.mean(), rel=1e-5)
        assert metrics[f"{place}/std"] == pytest.approx(scores.std(), rel=1e-5)
    violation = metrics["cost/score/mean"] - 1.0
    assert metrics["cost/violation"] == violation > 0.0
    assert metrics["cost/multiplier"] == 1.0, "the price that this step paid"
    assert ppo.multiplier == 1.0 + 0.25 * violation / SCALES["cost"].scale
    ppo.save(tmp_path / "checkpoint")
    other = learner(tiny_models, **sections)
    for name in SCALES:
        other.set_scale(RewardScale(9.0, 9.0), name)
    other.load(tmp_path / "checkpoint")
    assert (other.multiplier, other.scales) == (ppo.multiplier, ppo.scales)
    again, on = (each.update(items, minibatch_of=PLANS) for each in (other, ppo))
    assert {k: v for k, v in again.items() if "time/" not in k} == {k: v for k, v in on.items() if "time/" not in k}
    assert again["cost/multiplier"] > 1.0


def test_a_fixed_price_stays(tiny_models):
    ppo = learner(tiny_models, model=SEVERAL, cost={"multiplier": 0.5, "multiplier_lr": 0.0})
    prices = [ppo.update(judged_by_several(), minibatch_of=PLANS)["cost/multiplier"] for _ in range(2)]
    assert prices == [0.5, 0.5] and ppo.multiplier == 0.5


def test_samples_show_each_models_part_where_there_are_several(tiny_models):
    ppo = learner(tiny_models, model=SEVERAL)
    ppo.update(judged_by_several(), minibatch_of=PLANS)
    for row in ppo.samples(5):  # the sixth is cut, but its rule is `keep`
        parts = [row[f"reward/{name}"] for name in ("reward", "brevity", "cost")]
        assert row["reward"] == pytest.approx(sum(parts), abs=1e-5) and all(parts)
    alone = learner(tiny_models)
    alone.update(ALL, minibatch_of=PLANS)
    assert not [name for name in alone.samples(1)[0] if name.startswith("reward/")]


def test_a_capsule_holds_what_every_model_said(tiny_models, tmp_path):
    ppo, items = learner(tiny_models, capsules=tmp_path, model=SEVERAL), judged_by_several()
    items[2] = replace(items[2], ref_logprobs=np.full_like(items[2].ref_logprobs, np.nan))
    with pytest.raises(DivergenceError):
        ppo.update(items, minibatch_of=PLANS)
    (file,) = (tmp_path / "step_000000").glob("batch_*.safetensors")
    assert {"batch.by_model.cost.token_rewards", "batch.by_model.brevity.score"} <= load_file(file).keys()
    content = json.loads((tmp_path / "step_000000" / "capsule.json").read_text())
    assert content["multiplier"] == 1.0 and content["scales"]["cost"] == {"mean": -2.0, "scale": 0.5}
    assert "batch_rank_00000: batch.ref_logprobs" in replay_capsule(tmp_path / "step_000000").non_finite


def test_a_weighted_reward_model_is_a_critic_in_the_same_units(tiny_models):
    """Terminal mode, trunk + head: V = w (R - mean) / scale, whatever the weight."""
    sections = {"reward": {"mode": "terminal"}, "critic": {"init": "reward_model"}}
    values = {}
    for weight in (1.0, 0.5):
        ppo = learner(tiny_models, **sections, model={"policy": "p", "reward_model": "r", "reward_weight": weight})
        begun = ppo.critic.scale.item()
        ppo.set_scale(RewardScale(0.2, 1.5))
        assert ppo.critic.scale.item() == begun == pytest.approx(1.5 / weight)
        sparse = [changed(item, token_rewards=sparse_rewards(item)) for item in ALL]
        values[weight] = ppo.update(sparse, minibatch_of=PLANS)["critic/values/mean"]
    assert values[0.5] == pytest.approx(values[1.0] / 2, rel=1e-5) != 0.0


def sparse_rewards(item: ScoredTrajectory) -> np.ndarray:
    rewards = np.zeros_like(item.main.token_rewards)
    rewards[-1] = item.main.score
    return rewards


def test_guard_rails_are_those_of_the_data(tiny_models):
    ppo = learner(tiny_models)
    metrics = ppo.update(ALL, minibatch_of=PLANS)
    raw = [item.main.token_rewards[item.trajectory.prompt_len :] for item in ALL]
    size = sum(np.abs(rewards).sum() for rewards in raw)
    ended = sum(abs(rewards[-1]) for rewards in raw[:5])
    assert metrics["r3hf/sum/mean"] == pytest.approx(np.mean([rewards.sum() for rewards in raw]) / 1.5, rel=1e-4)
    spread = np.std([item.main.score for item in ALL])
    assert metrics["r3hf/sum_abs_over_std"] == pytest.approx(size / 6 / spread, rel=1e-4)
    assert metrics["r3hf/first_token_mass"] == pytest.approx(sum(abs(rewards[0]) for rewards in raw) / size, rel=1e-4)
    assert metrics["r3hf/eos_token_mass"] == pytest.approx(ended / size, rel=1e-4)
    assert metrics["r3hf/eos_jump_mass"] == pytest.approx(ended / size, rel=1e-4)
    assert metrics["r3hf/last_token_mass"] == pytest.approx((ended + abs(raw[5][-1])) / size, rel=1e-4)
    advantages = np.array([row["advantage"] for row in ppo.samples(6)])
    assert metrics["policy/positive_advantages"] == pytest.approx((advantages > advantages.mean()).mean())
    assert metrics["rollout/length_drift"] == 0.0
    assert ppo.update(ALL[:3], minibatch_of=[plan[:3] for plan in PLANS])["rollout/length_drift"] == pytest.approx(
        (13 / 3) / (26 / 6) - 1, abs=1e-6
    )


def test_a_tokenizer_that_does_not_meet_matters_where_prefixes_are_read(tiny_models):
    """The score of the whole response is the same however it is cut, so a sparse reward loses nothing."""
    items = [replace(item, alignment_loss=0.25 * (i % 2)) for i, item in enumerate(ALL)]
    sparse = [changed(item, token_rewards=sparse_rewards(item)) for item in items]
    dense = learner(tiny_models).update(items, minibatch_of=PLANS)
    terminal = learner(tiny_models, reward={"mode": "terminal"}).update(sparse, minibatch_of=PLANS)
    assert dense["r3hf/alignment_loss"] == 0.125
    assert "r3hf/alignment_loss" not in terminal


def test_without_a_critic_checkpoints_and_capsules_work(tiny_models, tmp_path):
    ppo = learner(tiny_models, capsules=tmp_path / "capsules", ppo={"advantage": "rloo"})
    ppo.update(ALL, minibatch_of=PLANS)
    ppo.save(tmp_path / "checkpoint")
    other = learner(tiny_models, capsules=tmp_path / "capsules", ppo={"advantage": "rloo"})
    other.load(tmp_path / "checkpoint")
    assert other.first == ppo.first != {}
    assert other.update(ALL, minibatch_of=PLANS)["policy/loss"] == ppo.update(ALL, minibatch_of=PLANS)["policy/loss"]
    other.set_scale(RewardScale(0.0, 2.0))
    broken = [*ALL[:2], replace(ALL[2], ref_logprobs=np.full_like(ALL[2].ref_logprobs, np.nan)), *ALL[3:]]
    with pytest.raises(DivergenceError, match="policy/loss nan"):
        other.update(broken, minibatch_of=PLANS)
    replay = replay_capsule(tmp_path / "capsules" / "step_000002")
    assert np.isnan(replay.policy_loss) and (replay.critic_loss, replay.critic_grad_norm) == (0.0, 0.0)
