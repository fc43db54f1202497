"""From a scored batch to what PPO trains on: evaluation, rewards in their units and summed, advantages."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from r3hf_ray.algorithms.advantages import (
    gae,
    grpo_advantages,
    kl_penalized_rewards,
    returns_to_go,
    rloo_advantages,
    whole_returns,
)
from r3hf_ray.algorithms.batching import Batch, BatchScores, chosen_rows, masked_filler, microbatches
from r3hf_ray.algorithms.losses import importance_weights
from r3hf_ray.algorithms.masking import moments, whiten
from r3hf_ray.algorithms.redistribution import settle_eos_jump, telescoping_error
from r3hf_ray.algorithms.scaling import missing_eos, normalize, normalize_shares
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import TelescopingError
from r3hf_ray.methods import TELESCOPING_TOLERANCE
from r3hf_ray.models.sharding import all_gather_rows, all_reduce_max, all_reduce_sum
from r3hf_ray.models.values import state_values


@dataclass(frozen=True, slots=True)
class RewardScale:
    """Mean and standard deviation of one model's sequence reward under the initial policy, in that model's units."""

    mean: float = 0.0
    scale: float = 1.0


Seen = tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]]
"""What `evaluate` gives: logprobs, entropy and values of `Experience`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A batch after the learner looked at it: everything that is logged, sampled or trained on, without a gradient.

    ``[B, T]``, 0 outside the response.

    Example, a response of 2 tokens to a prompt of 2: ``batch.response_mask=[[0, 0, 1, 1]]``,
    ``logprobs=[[0, 0, -0.1, -1.3]]``, ``advantages=[[0, 0, 0.3, 2.0]]``, ``whitened=[[0, 0, -0.7, 1.2]]``.
    """

    batch: Batch
    logprobs: Float[Tensor, "B T"]
    """Of the sampled tokens, by the policy at the start of the PPO step: PPO's *old*. [nats]"""
    entropy: Float[Tensor, "B T"]
    """Of the distribution each token was drawn from. [nats]"""
    values: Float[Tensor, "B T"]
    """Of the critic at the start of the PPO step; 0 without one."""
    parts: dict[str, Float[Tensor, "B T"]]
    """Each model's scaled rewards times its weight, by name; the cost's have the opposite sign of the cost."""
    rewards: Float[Tensor, "B T"]
    """Their sum, with the missing-EOS rule, without KL."""
    total_rewards: Float[Tensor, "B T"]
    """`rewards` minus the KL penalty, where that is inside the reward."""
    advantages: Float[Tensor, "B T"]
    """Before whitening."""
    whitened: Float[Tensor, "B T"]
    """As the loss uses them: advantages whitened by the moments of all ranks, where `ppo.whiten_advantages` is on."""
    returns: Float[Tensor, "B T"]
    """Targets of the critic."""
    importance: Float[Tensor, "B T"]
    """Off-policy weights; 1 on the response without `ppo.importance_cap`."""
    kl_price: Float[Tensor, "B T"]
    """Of the KL inside the loss; 0 where it is inside the reward. [scaled reward a nat]"""
    telescoping_error: Float[Tensor, "B"]
    """The largest over models."""

    def rows(self, index: Sequence[int]) -> "Experience":
        """The rows ``index`` (at least one), in that order, trimmed to the longest of them."""
        return chosen_rows(self, index, self.batch.attention_mask)

    def filler(self) -> "Experience":
        """One short row without a response token: it joins the other ranks' collectives and adds exactly 0."""
        row = self.rows([int(self.batch.attention_mask.sum(1).argmin())])
        return replace(row, batch=masked_filler(row.batch))


@torch.no_grad()
def evaluate(policy: nn.Module, critic: nn.Module | None, batch: Batch, config: PPOConfig) -> Seen:
    """Run the models on the batch, in microbatches of the training's size. A collective: ranks agree on how many.

    With `ppo.old_logprobs = "sampler"` the policy is not run, and the entropy is not known: 0.
    """
    groups = microbatches(batch.lengths, budget_tokens=config.ppo.microbatch_tokens)
    count = int(all_reduce_max(torch.tensor(len(groups), device=batch.token_ids.device)))
    logprobs, entropy, values = torch.zeros(3, *batch.token_ids.shape, device=batch.token_ids.device)
    for number in range(count):
        index = groups[number] if number < len(groups) else []
        rows = batch.rows(index) if index else masked_filler(batch)
        arrays = (rows.token_ids, rows.attention_mask, rows.response_mask)
        chosen, spread = rows.behavior_logprobs, torch.zeros_like(rows.behavior_logprobs)
        if config.ppo.old_logprobs == "learner":
            chosen, spread = policy(*arrays, temperature=config.rollout.temperature, entropy=True)
        before = torch.zeros_like(chosen) if critic is None else state_values(critic, *arrays)
        if index:
            for whole, part in ((logprobs, chosen), (entropy, spread), (values, before)):
                whole[index, : part.shape[1]] = part
    return logprobs, entropy, values


def require_telescoping(batch: Batch, config: PPOConfig) -> Float[Tensor, "B"]:
    """The relative error of every response's reward sum, of the model where it is largest.

    A collective, so that all ranks stop together.

    Raises:
        TelescopingError: on any rank a sum of any model is off, or is NaN.
    """
    errors = torch.stack([_telescoping_error(part, batch, config) for part in batch.by_model.values()])
    error, worst = errors.max(0)  # NaN is the largest
    broken = ~(error <= TELESCOPING_TOLERANCE)  # this way round, NaN is broken too
    if all_reduce_max(broken.any().float()).item():
        rows = broken.nonzero()[:3, 0].tolist()
        names = list(batch.by_model)
        of = [f" ({names[int(worst[i])]})" if len(names) > 1 else "" for i in rows]
        where = ", ".join(
            f"prompt {int(batch.prompt_ids[i])}{name} by {float(error[i]):.1e}"
            for i, name in zip(rows, of, strict=True)
        )
        raise TelescopingError(
            f"token rewards do not add up to the sequence reward ({where or 'on another rank'}; tolerance "
            f"{TELESCOPING_TOLERANCE:.0e}): do reward actors and learner have the same [reward] section?"
        )
    return error


def make_experience(
    batch: Batch,
    seen: Seen,
    error: Float[Tensor, "B"],
    config: PPOConfig,
    *,
    scales: Mapping[str, RewardScale],
    kl_coef: float,
    multiplier: float,
) -> Experience:
    """Raw token rewards -> scaled -> summed over models -> missing-EOS rule -> KL penalty -> advantages.

    (arXiv 2411.08302, Eq. 6 to 8, and with a cost its safety task, of which ``1/2 (r - c)`` is the sum with weights
    1/2 and -1/2.)

    A collective, since advantages are whitened, and compare the samples of a prompt, over all ranks.

    Args:
        batch: with rewards in the reward model's units.
        seen: from `evaluate`.
        error: from `require_telescoping`.
        config: of the run.
        scales: of each model's rewards, by name.
        kl_coef: at present, scaled reward per nat.
        multiplier: lambda of the cost at present, scaled reward per scaled cost.

    Raises:
        ValueError: the batch was not scored by the models of the run.
    """
    mask, reward, ppo = batch.response_mask, config.reward, config.ppo
    logprobs, entropy, values = seen
    parts = _parts(batch, config, scales, multiplier)
    rewards = reduce(operator.add, parts.values())
    rewards = missing_eos(rewards, mask, batch.truncated, rule=reward.missing_eos, penalty=reward.missing_eos_penalty)
    in_reward = ppo.kl_in == "reward"
    total = rewards
    if in_reward:
        total = kl_penalized_rewards(
            rewards, logprobs, batch.ref_logprobs, mask, kl_coef=kl_coef, estimator=ppo.kl_estimator
        )
    advantages, returns = _advantages(total, values, batch, config)
    importance = mask.to(rewards.dtype)
    if ppo.importance_cap is not None:
        importance = importance_weights(logprobs, batch.behavior_logprobs, mask, cap=ppo.importance_cap)
    return Experience(
        batch=batch,
        logprobs=logprobs,
        entropy=entropy,
        values=values,
        parts=parts,
        rewards=rewards,
        total_rewards=total,
        advantages=advantages,
        whitened=_whitened(advantages, mask) if ppo.whiten_advantages else advantages,
        returns=returns,
        importance=importance,
        kl_price=mask.to(rewards.dtype) * (0.0 if in_reward else kl_coef),
        telescoping_error=error,
    )


def _telescoping_error(part: BatchScores, batch: Batch, config: PPOConfig) -> Float[Tensor, "B"]:
    mask, reward = batch.response_mask, config.reward
    return telescoping_error(
        part.token_rewards,
        settle_eos_jump(part.scores, mask, ~batch.truncated, rule=reward.eos_jump),
        mask,
        mode=reward.mode,
        beta_c=reward.method_weight,
        subtract_prompt_score=reward.subtract_prompt_score,
    )


def _parts(
    batch: Batch, config: PPOConfig, scales: Mapping[str, RewardScale], multiplier: float
) -> dict[str, Float[Tensor, "B T"]]:
    """Each model's rewards as they enter the sum: scaled and centred by its own scale, times its weight."""
    weights, scored = config.model.weights(multiplier), batch.by_model
    if weights.keys() != scored.keys():
        raise ValueError(f"the run's models are {', '.join(weights)}, but responses were scored by {', '.join(scored)}")
    mask = batch.response_mask
    return {name: weight * _scaled(scored[name], mask, config, scales[name]) for name, weight in weights.items()}


def _scaled(
    part: BatchScores, mask: Bool[Tensor, "B T"], config: PPOConfig, scale: RewardScale
) -> Float[Tensor, "B T"]:
    rewards = part.token_rewards
    if config.reward.facts.pays_shares:
        return normalize_shares(rewards, part.score, mask, mean=scale.mean, scale=scale.scale)
    weight = config.terminal_weight
    return normalize(rewards, mask, mean=scale.mean, scale=scale.scale, terminal_weight=weight)


def _advantages(
    rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"], batch: Batch, config: PPOConfig
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages before whitening, and returns, by `ppo.advantage`."""
    ppo, mask = config.ppo, batch.response_mask
    if ppo.advantage == "gae":
        return gae(rewards, values, mask, gamma=ppo.gamma, lam=ppo.gae_lambda)
    to_go = returns_to_go(rewards, mask, gamma=ppo.gamma)
    if ppo.advantage in ("reinforce_pp", "r3hf_baseline"):  # the one is whitened, the other has its baseline inside
        return to_go, to_go
    everyone = (all_gather_rows(batch.prompt_ids), all_gather_rows(whole_returns(to_go, mask)))
    relative = {"rloo": rloo_advantages, "grpo": grpo_advantages}[ppo.advantage]
    return relative(to_go, mask, batch.prompt_ids, everyone), to_go


def _whitened(advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return whiten(advantages, mask, all_reduce_sum(moments(advantages, mask)))
