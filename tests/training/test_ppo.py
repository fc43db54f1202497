import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from r3hf_ray.algorithms import batching
from r3hf_ray.algorithms.advantages import gae
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import CheckpointError, DivergenceError, TelescopingError
from r3hf_ray.models.sharding import full_parameters, make_mesh
from r3hf_ray.training import trained_models
from r3hf_ray.training.divergence import replay_capsule
from r3hf_ray.training.experience import RewardScale
from r3hf_ray.training.ppo import PPOLearner
from r3hf_ray.training.ppo_losses import policy_share
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory, Trajectory

SHAPES = [(3, 8), (2, 5), (6, 1), (1, 9), (4, 4), (3, 3), (5, 7), (2, 2)]
"""Prompt and response lengths."""
MINIBATCH_OF = [[0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0, 1, 0]]
"""Two epochs of two minibatches; dealt to two ranks by `RANKS`, the second rank has none in the first."""
RANKS = [[0, 2, 3, 4, 5, 6], [1, 7]]


def scored(index, seed=0):
    prompt_len, length = SHAPES[index]
    rng = np.random.default_rng((seed, index))

    def per_token(mean, std):
        return np.concatenate([np.zeros(prompt_len), rng.normal(mean, std, length)]).astype(np.float32)

    prefix, prompt_score = per_token(0.0, 1.0), float(rng.normal())
    rewards = np.zeros_like(prefix)
    rewards[prompt_len:] = np.diff(prefix[prompt_len:], prepend=np.float32(prompt_score))
    finish = Finish.LENGTH if index % 4 == 3 else Finish.EOS
    ids = rng.integers(3, 40, prompt_len + length).astype(np.int32)
    trajectory = Trajectory(
        prompt_id=10 + index,
        sample=0,
        attempt=0,
        policy_version=0,
        prompt_len=prompt_len,
        finish=finish,
        token_ids=ids,
        behavior_logprobs=per_token(-3.7, 0.3),
    )
    main = ModelScores(token_rewards=rewards, prefix_scores=prefix, score=float(prefix[-1]), prompt_score=prompt_score)
    return ScoredTrajectory(trajectory=trajectory, ref_logprobs=per_token(-3.7, 0.3), by_model={MAIN: main})


def batch(rank=0, world=1, seed=0):
    rows = RANKS[rank] if world == 2 else range(len(SHAPES))
    return [scored(i, seed) for i in rows], [[epoch[i] for i in rows] for epoch in MINIBATCH_OF]


def configuration(tiny_models, **sections):
    given = {
        "run": {"name": "test"},
        "model": {"policy": str(tiny_models.tied), "reward_model": str(tiny_models.reward)},
        "data": {"source": "none"},
        "rollout": {"prompts_per_step": 8, "temperature": 0.9},
        "optimizer": {"policy_lr": 1e-3, "critic_lr": 2e-3},
    }
    return PPOConfig(**{name: given.get(name, {}) | sections.get(name, {}) for name in given.keys() | sections.keys()})


def learner(tiny_models, mesh=None, scale=None, capsules=None, **sections):
    config = configuration(tiny_models, **sections)
    return PPOLearner(config, scale=scale or RewardScale(0.2, 1.5), device="cpu", mesh=mesh, capsules=capsules)


def update(ppo, rank=0, world=1, seed=0):
    trajectories, minibatch_of = batch(rank, world, seed)
    return ppo.update(trajectories, minibatch_of=minibatch_of)


def weights(ppo):
    named = {**dict(full_parameters(ppo.policy.model)), **dict(full_parameters(ppo.critic))}
    return {name: x.numpy().copy() for name, x in named.items()}


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "perf/"))}


def two_updates(tiny_models, rank=0, world=1, **sections):
    ppo = learner(tiny_models, make_mesh(2, "cpu") if world == 2 else None, **sections)
    metrics = [without_times(update(ppo, rank, world, seed)) for seed in (0, 1)]
    return metrics, weights(ppo)


def assert_same(one, other, atol=2e-6):
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            near = 0.02 if name == "critic/clipfrac" else 1e-5  # a value on the edge of its clip counts or not
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=near), name
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        np.testing.assert_allclose(one[1][name], other[1][name], rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def alone(tiny_models):
    """Two updates on one rank in one microbatch: what every split must give."""
    return two_updates(tiny_models)


@pytest.mark.parametrize(
    "sections",
    [
        {"ppo": {"microbatch_tokens": 12}},
        {"ppo": {"microbatch_tokens": 25}},
        {"learner": {"gradient_checkpointing": True}},
    ],
)
def test_any_split_into_microbatches_gives_the_same_step(tiny_models, alone, sections):
    assert_same(two_updates(tiny_models, **sections), alone)


def test_parted_microbatches_give_the_same_loss_and_gradients(tiny_models, monkeypatch):
    ppo, metrics, gradients, losses = learner(tiny_models), [], [], []
    update(ppo)
    experience = ppo._last[1]
    for worth in (1, 10**6):
        monkeypatch.setattr(batching, "WORTH_A_FORWARD", worth)
        metrics.append(update(learner(tiny_models)))
        groups = batching.microbatches(experience.batch.lengths, budget_tokens=8192)
        assert (len(groups) > 1) == (worth == 1)
        ppo.policy.zero_grad()
        parts = [policy_share(ppo.policy, experience.rows(group), ppo.config, 10)[0] for group in groups]
        sum(parts).backward()
        losses.append(float(sum(parts).detach()))
        gradients.append([p.grad.clone() for p in ppo.policy.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-7)
    for mine, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert 1.0 < metrics[0]["perf/padding"] < metrics[1]["perf/padding"]


@pytest.mark.parametrize("sections", [{}, {"ppo": {"microbatch_tokens": 12}, "learner": {"shard_blocks": "always"}}])
def test_two_ranks_give_the_same_step_as_one(tiny_models, alone, run_ranks, sections):
    results = run_ranks(lambda rank: two_updates(tiny_models, rank, 2, **sections))
    for result in results:
        assert_same(result, alone)
    assert results[0][0] == results[1][0]


def test_a_rerun_is_bitwise_equal(tiny_models, alone):
    again = two_updates(tiny_models)
    assert again[0] == alone[0]
    assert all((again[1][name] == x).all() for name, x in alone[1].items())


def test_one_step_equals_plain_transformers_and_torch(tiny_models):
    """An independent PPO step: whole logits, no microbatches, no classes of ours but GAE."""
    sections = {"ppo": {"epochs": 1, "minibatches": 1, "kl_coef": 0.1}, "reward": {"missing_eos": "penalty"}}
    ppo = learner(tiny_models, scale=RewardScale(0.2, 1.5), **sections)
    trajectories = [scored(i) for i in range(len(SHAPES))]
    before = ppo.evaluate_probe([5, 6, 7])
    metrics = ppo.update(trajectories, minibatch_of=[[0] * len(SHAPES)])

    model = AutoModelForCausalLM.from_pretrained(tiny_models.tied).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0)
    logprobs, advantages, totals, kls = [], [], [], []
    for item in trajectories:
        t = item.trajectory
        ids = torch.from_numpy(t.token_ids).long()
        every = F.log_softmax(model(ids[None]).logits[0, :-1] / 0.9, dim=-1).gather(1, ids[1:, None])[:, 0]
        chosen = every[t.prompt_len - 1 :]
        rewards = torch.from_numpy(item.main.token_rewards[t.prompt_len :]) / 1.5
        if t.finish is Finish.LENGTH:
            rewards[-1] -= 1.0
        kl = chosen.detach() - torch.from_numpy(item.ref_logprobs[t.prompt_len :])
        total = (rewards - 0.1 * kl)[None]
        advantage, _ = gae(
            total, torch.zeros_like(total), torch.ones_like(total, dtype=torch.bool), gamma=1.0, lam=0.95
        )
        logprobs.append(chosen)
        advantages.append(advantage[0])
        totals.append(float(total.sum()))
        kls.append(float(kl.sum()))
    raw = torch.cat(advantages)
    white = (raw - raw.mean()) / raw.std(correction=0)
    new = torch.cat(logprobs)
    loss = -(white * (new - new.detach()).exp()).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    for name, x in ppo.full_parameters():
        torch.testing.assert_close(x, model.state_dict()[name], rtol=0, atol=2e-6)
    assert metrics["policy/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["policy/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["critic/advantages/mean"] == pytest.approx(float(raw.mean()), abs=1e-5)
    assert metrics["critic/advantages/std"] == pytest.approx(float(raw.std(correction=0)), rel=1e-5)
    assert metrics["kl/ref/mean"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert metrics["reward/total/mean"] == pytest.approx(np.mean(totals), rel=1e-4)
    assert ppo.step == 1 and before != ppo.evaluate_probe([5, 6, 7])


def test_first_step_ratio_is_one_and_nothing_is_clipped(tiny_models):
    ppo = learner(tiny_models, ppo={"epochs": 1, "minibatches": 1})
    metrics = ppo.update(batch()[0], minibatch_of=[[0] * len(SHAPES)])
    assert metrics["policy/ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/ratio/max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clipfrac"] == metrics["critic/clipfrac"] == 0.0
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_metrics_are_those_of_the_data(tiny_models):
    items = batch()[0]
    metrics = update(learner(tiny_models, ppo={"importance_cap": 1.1}))
    scores = np.array([item.main.score for item in items])
    assert metrics["reward/score/mean"] == pytest.approx(scores.mean(), rel=1e-5)
    assert metrics["reward/score/std"] == pytest.approx(scores.std(), rel=1e-5)
    assert (metrics["reward/score/min"], metrics["reward/score/max"]) == pytest.approx((scores.min(), scores.max()))
    per_token = [item.main.token_rewards[item.trajectory.prompt_len :] / 1.5 for item in items]
    rewards = np.concatenate(per_token)
    assert metrics["r3hf/token_reward/mean"] == pytest.approx(rewards.mean(), rel=1e-4)
    assert metrics["r3hf/token_reward/std"] == pytest.approx(rewards.std(), rel=1e-5)
    assert metrics["r3hf/token_reward/absmax"] == pytest.approx(np.abs(rewards).max(), rel=1e-5)
    last = sum(abs(x[-1]) for x in per_token)
    assert metrics["r3hf/last_token_mass"] == pytest.approx(last / np.abs(rewards).sum(), rel=1e-5)
    position = np.concatenate([np.arange(len(x)) for x in per_token])
    assert metrics["r3hf/position_corr"] == pytest.approx(np.corrcoef(position, rewards)[0, 1], rel=1e-4)
    assert metrics["r3hf/telescoping_error/max"] < 1e-6
    assert metrics["r3hf/empty_prefix_score/mean"] == pytest.approx(
        np.mean([i.main.prompt_score for i in items]), rel=1e-5
    )
    assert metrics["rollout/response_length/mean"] == pytest.approx(np.mean([r for _, r in SHAPES]))
    assert metrics["rollout/response_length/max"] == 9
    assert metrics["rollout/prompt_length/mean"] == pytest.approx(np.mean([p for p, _ in SHAPES]))
    assert metrics["rollout/truncated_frac"] == 0.25 == 1 - metrics["rollout/eos_frac"]
    assert metrics["critic/values/mean"] == 0.0 and metrics["critic/explained_var"] == 0.0
    assert 0 < metrics["policy/entropy"] < np.log(40)
    assert 0 < metrics["kl/is_weight/mean"] <= metrics["kl/is_weight/max"] <= 1.1 + 1e-6
    assert metrics["kl/coef"] == 0.05 and metrics["async/staleness/max"] == 0
    assert {f"time/{x}" for x in ("evaluate", "advantage", "train_policy", "train_critic")} <= metrics.keys()
    assert all(isinstance(x, float) for x in metrics.values())


def test_sampler_drift_and_staleness_are_measured(tiny_models):
    ppo = learner(tiny_models)
    update(ppo)
    rows = [row for row in ppo.samples(8)]
    behavior = np.concatenate([i.trajectory.behavior_logprobs[i.trajectory.prompt_len :] for i in batch()[0]])
    gap = behavior - np.array([row["logprob"] for row in rows])
    metrics = update(learner(tiny_models))
    assert metrics["kl/sampler/mean"] == pytest.approx(gap.mean(), rel=1e-4)
    assert metrics["kl/sampler/logp_absdiff_mean"] == pytest.approx(np.abs(gap).mean(), rel=1e-5)
    assert metrics["kl/sampler/logp_absdiff_max"] == pytest.approx(np.abs(gap).max(), rel=1e-5)
    assert update(ppo, seed=1)["async/staleness/mean"] == 1.0


def test_samples_are_rows_a_response_token(tiny_models):
    ppo = learner(tiny_models)
    assert ppo.samples(2) == []
    update(ppo)
    rows = ppo.samples(2)
    assert len(rows) == SHAPES[0][1] + SHAPES[1][1]
    item = scored(0)
    first = rows[0]
    assert (first["step"], first["prompt_id"], first["position"], first["finish"]) == (1, 10, 0, "eos")
    assert first["token_id"] == item.trajectory.token_ids[3]
    assert first["token"] == f"w{first['token_id'] - 4}"
    assert len(first["prompt"].split()) == 3
    assert first["reward"] == pytest.approx(item.main.token_rewards[3] / 1.5)
    assert first["kl"] == pytest.approx(first["logprob"] - item.ref_logprobs[3])
    assert rows[7]["prefix_score"] == pytest.approx(item.main.score) and rows[0]["gold"] is None
    json.dumps(rows)


@pytest.mark.parametrize(("init", "zero"), [("sft", True), ("reward_trunk", True), ("reward_model", False)])
def test_where_the_critic_starts(tiny_models, init, zero):
    ppo = learner(tiny_models, critic={"init": init}, ppo={"epochs": 1, "minibatches": 1})
    trunk = dict(ppo.critic.trunk.named_parameters())["embed_tokens.weight"].detach().clone()
    source = ppo.policy.model.get_input_embeddings().weight.detach().clone()
    assert torch.equal(trunk, source) == (init == "sft")
    metrics = ppo.update(batch()[0], minibatch_of=[[0] * len(SHAPES)])
    assert (metrics["critic/values/mean"] == 0.0) == zero
    # the critic's trunk is its own: one model's step must not move the other's weights twice
    assert ppo.critic.trunk.embed_tokens.weight.data_ptr() != ppo.policy.model.get_input_embeddings().weight.data_ptr()


def test_the_critic_may_start_from_another_model(tiny_models, tmp_path):
    other = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward)
    torch.nn.init.constant_(other.score.weight, 0.25)
    other.save_pretrained(tmp_path)
    critic = {"init": "reward_model", "source": str(tmp_path)}
    head = learner(tiny_models, critic=critic).critic.head.weight
    assert torch.equal(head, torch.full_like(head, 0.25))
    head = learner(tiny_models, critic=critic | {"init": "reward_trunk"}).critic.head.weight
    assert not head.any()


def test_warmup_and_kl_controller(tiny_models):
    ppo = learner(tiny_models, optimizer={"warmup_steps": 8}, ppo={"kl_target": 0.01, "kl_horizon": 100.0})
    assert update(ppo)["policy/lr"] == pytest.approx(1e-3 * 4 / 8)
    assert update(ppo, seed=1)["policy/lr"] == pytest.approx(1e-3)
    metrics = update(ppo, seed=2)
    assert metrics["policy/lr"] == pytest.approx(1e-3)
    assert metrics["kl/coef"] != 0.05


def test_probe_is_transformers_logprobs(tiny_models):
    ids = [5, 9, 30, 2, 7]
    logits = AutoModelForCausalLM.from_pretrained(tiny_models.tied)(torch.tensor([ids])).logits[0, :-1]
    expected = F.log_softmax(logits, -1).gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert learner(tiny_models).evaluate_probe(ids) == pytest.approx([0.0, *expected], abs=1e-5)


def test_rewards_that_do_not_add_up_stop_every_rank(tiny_models, run_ranks):
    for wrong in (0.01, np.nan):
        items, minibatch_of = batch()
        items[2].main.token_rewards[-1] += wrong
        with pytest.raises(TelescopingError, match="prompt 12"):
            learner(tiny_models).update(items, minibatch_of=minibatch_of)

    def on_a_rank(rank):
        ppo = learner(tiny_models, make_mesh(2, "cpu"))
        items, minibatch_of = batch(rank, 2)
        items[0].main.token_rewards[-1] += 0.01 * rank
        try:
            ppo.update(items, minibatch_of=minibatch_of)
        except TelescopingError as error:
            return str(error)

    first, second = run_ranks(on_a_rank)
    assert "on another rank" in first and "prompt 11" in second


def test_minibatches_that_do_not_fit_are_refused(tiny_models):
    with pytest.raises(ValueError, match="8 trajectories"):
        learner(tiny_models).update(batch()[0], minibatch_of=[[0, 1]])


def test_divergence_is_raised_before_the_step_and_replays(tiny_models, tmp_path):
    ppo = learner(tiny_models, capsules=tmp_path)
    before = weights(ppo)
    items, minibatch_of = batch()
    items[2].ref_logprobs[-1] = np.nan  # in minibatch 0 of the first epoch; whitening then spoils every advantage
    with pytest.raises(DivergenceError, match=r"step 0, epoch 0, minibatch 0: .*nan.*r3hf replay"):
        ppo.update(items, minibatch_of=minibatch_of)
    assert ppo.step == 0 and all((weights(ppo)[name] == x).all() for name, x in before.items())
    replay = replay_capsule(tmp_path / "step_000000")
    assert replay.non_finite[0] == "batch_rank_00000: batch.ref_logprobs", "the cause comes first"
    assert {"policy loss", "critic loss"} <= set(replay.non_finite)
    assert np.isnan(replay.policy_loss)
    content = json.loads((tmp_path / "step_000000" / "capsule.json").read_text())
    assert content["seed"] == 0 and content["config"]["run"]["name"] == "test" and "torch" in content["versions"]
    assert sorted(path.suffix for path in (tmp_path / "step_000000").iterdir()) == ["", "", ".json", ".safetensors"]


def test_a_replay_gives_the_losses_that_the_learner_saw(tiny_models, tmp_path):
    ppo = learner(tiny_models, capsules=tmp_path, ppo={"kl_coef": 0.0, "microbatch_tokens": 25})
    items, minibatch_of = batch()
    # A reward so large that its square overflows, while the whitened advantages stay finite.
    main = dataclasses.replace(
        items[0].main,
        score=1e25,
        token_rewards=np.array([0, 0, 0, 1e25 - items[0].main.prompt_score, *[0] * 7], dtype=np.float32),
        prefix_scores=np.array([0, 0, 0, *[1e25] * 8], dtype=np.float32),
    )
    items[0] = dataclasses.replace(items[0], by_model={MAIN: main})
    with pytest.raises(DivergenceError, match="critic/loss inf"):
        ppo.update(items, minibatch_of=minibatch_of)
    content = json.loads((tmp_path / "step_000000" / "capsule.json").read_text())
    replay = replay_capsule(tmp_path / "step_000000")
    assert replay.policy_loss == pytest.approx(content["policy/loss"], rel=1e-6)
    assert replay.policy_grad_norm == pytest.approx(content["policy/grad_norm"], rel=1e-5)
    assert replay.critic_loss == content["critic/loss"] == np.inf
    assert replay.non_finite[0] == "critic loss"


def test_broken_weights_are_named_first(tiny_models, tmp_path):
    ppo = learner(tiny_models, capsules=tmp_path)
    with torch.no_grad():
        ppo.policy.model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    with pytest.raises(DivergenceError):
        update(ppo)
    named = replay_capsule(tmp_path / "step_000000").non_finite
    assert "policy parameter: model.model.layers.1.mlp.up_proj.weight" in named


def test_two_ranks_diverge_together(tiny_models, tmp_path, run_ranks):
    def on_a_rank(rank):
        ppo = learner(tiny_models, make_mesh(2, "cpu"), capsules=tmp_path)
        items, minibatch_of = batch(rank, 2)
        if rank == 1:
            items[1].ref_logprobs[-1] = np.inf
        try:
            ppo.update(items, minibatch_of=minibatch_of)
        except DivergenceError as error:
            return str(error)

    first, second = run_ranks(on_a_rank)
    assert first == second and "minibatch 0" in first
    replay = replay_capsule(tmp_path / "step_000000")
    assert np.isnan(replay.policy_loss) and replay.non_finite


@pytest.mark.parametrize("world", [1, 2])
def test_going_on_from_a_checkpoint_is_bitwise_the_same(tiny_models, tmp_path, run_ranks, world):
    folder = tmp_path / "checkpoint"
    sections = {"optimizer": {"warmup_steps": 20}, "ppo": {"kl_target": 1.0}, "critic": {"init": "reward_model"}}

    def uninterrupted(rank):
        ppo = learner(tiny_models, make_mesh(2, "cpu") if world == 2 else None, **sections)
        update(ppo, rank, world)
        ppo.save(folder)
        return without_times(update(ppo, rank, world, seed=1)), weights(ppo)

    def resumed(rank):
        other = RewardScale(9.0, 9.0)
        ppo = learner(tiny_models, make_mesh(2, "cpu") if world == 2 else None, scale=other, **sections)
        ppo.load(folder)
        assert ppo.step == 1 and ppo.scales == {"reward": RewardScale(0.2, 1.5)}
        return without_times(update(ppo, rank, world, seed=1)), weights(ppo)

    for one, other in zip(run_ranks(uninterrupted, world=world), run_ranks(resumed, world=world), strict=True):
        assert one[0] == other[0]
        assert all((one[1][name] == x).all() for name, x in other[1].items())


def test_saving_before_the_first_step_changes_nothing(tiny_models, alone, tmp_path):
    ppo = learner(tiny_models)
    ppo.save(tmp_path / "checkpoint")
    assert without_times(update(ppo)) == alone[0][0]
    fresh = learner(tiny_models)
    fresh.load(tmp_path / "checkpoint")
    assert without_times(update(fresh)) == alone[0][0]


def test_the_policy_is_saved_as_a_model_folder(tiny_models, tmp_path):
    ppo = learner(tiny_models)
    update(ppo)
    ppo.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, x in ppo.full_parameters():
        assert torch.equal(model.state_dict()[name], x)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<eos>"


def test_the_saved_policy_names_every_end(tiny_models, cases, tmp_path):
    models = {"policy": str(cases / "policy_eos_is_not_template_end"), "reward_model": str(cases / "ok_rm")}
    ppo = learner(tiny_models, model=models)
    update(ppo)
    ppo.save_pretrained(tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [256, 258]


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_stays_near_float32(tiny_models, alone, run_ranks, world):
    def on_a_rank(rank):
        ppo = learner(tiny_models, make_mesh(world, "cpu"), learner={"dtype": "bfloat16"})
        metrics = update(ppo, rank, world)
        return metrics, weights(ppo)

    for metrics, parameters in run_ranks(on_a_rank, world=world):
        reference = alone[0][0]
        assert metrics["kl/ref/mean"] == pytest.approx(reference["kl/ref/mean"], abs=0.2)
        assert metrics["critic/loss"] == pytest.approx(reference["critic/loss"], rel=0.05)
        assert metrics["policy/grad_norm"] == pytest.approx(reference["policy/grad_norm"], rel=0.2)
        assert {x.dtype for name, x in parameters.items() if name != "summed"} == {np.dtype("float32")}


def test_a_schedule_is_followed_and_not_changed_on_the_way(tiny_models, tmp_path):
    sections = {"ppo": {"steps": 2}, "optimizer": {"policy_lr": 1e-3, "lr_schedule": "linear"}}
    ppo = learner(tiny_models, **sections)
    update(ppo)
    ppo.save(tmp_path / "checkpoint")
    expected = update(ppo, seed=1)
    again = learner(tiny_models, **sections)
    again.load(tmp_path / "checkpoint")
    assert without_times(update(again, seed=1)) == without_times(expected)
    assert expected["policy/lr"] == pytest.approx(1e-3 * 1 / 8)  # the last of 2 x 2 x 2 optimizer steps
    other = learner(tiny_models, optimizer={"lr_schedule": "cosine"})
    with pytest.raises(CheckpointError, match="lr_schedule was linear and is cosine now"):
        other.load(tmp_path / "checkpoint")


def test_old_logprobs_of_the_sampler_save_a_forward_and_say_how_far_off_they_are(tiny_models):
    ppo = learner(tiny_models, ppo={"old_logprobs": "sampler"})
    entropies = []
    ppo.policy.register_forward_hook(
        lambda _, given, named, out: entropies.append(named.get("entropy", False)), with_kwargs=True
    )
    metrics = update(ppo)
    assert entropies and not any(entropies)
    batch, seen = ppo._last[1].batch, ppo._last[1]
    assert torch.equal(seen.logprobs, batch.behavior_logprobs)
    assert metrics["kl/sampler/start"] > 0.0
    assert "policy/entropy" not in metrics and "kl/sampler/mean" not in metrics
    assert "kl/sampler/start" not in update(learner(tiny_models))


def test_a_kl_that_is_not_measured_is_not_logged(tiny_models):
    assert "kl/ref/mean" in update(learner(tiny_models, ppo={"kl_coef": 0.0}))
    ppo = learner(tiny_models, ppo={"kl_coef": 0.0, "log_kl": False})
    assert "kl/ref/mean" not in update(ppo) and not ppo.config.has_reference
    priced = configuration(tiny_models, ppo={"kl_coef": 0.1, "log_kl": False})
    asked = configuration(
        tiny_models,
        ppo={"kl_coef": 0.0, "log_kl": False},
        reward={"mode": "segment", "segment_by": "entropy"},
    )
    assert priced.has_reference and asked.has_reference


def test_ranks_that_read_their_own_slices_give_the_same_step(tiny_models, alone, run_ranks):
    def on_a_rank(rank):
        trained_models.WHOLE_BELOW = 0
        return two_updates(tiny_models, rank, 2, learner={"shard_blocks": "always"})

    for result in run_ranks(on_a_rank):
        assert_same(result, alone)
