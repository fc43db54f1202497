"""The metrics and samples of a PPO step; metrics come from sums over ranks, so they do not depend on the split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r3hf_ray.algorithms.batching import Batch
from r3hf_ray.algorithms.masking import last_token, masked_sum, moments
from r3hf_ray.algorithms.redistribution import eos_jump, r3hf
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.models.sharding import all_reduce_max, all_reduce_sum
from r3hf_ray.training.experience import Experience
from r3hf_ray.types import COST, MAIN, ScoredTrajectory

GoldCredit = Callable[[str, list[str]], Sequence[float]]
"""(prompt text, text of each response token) -> what each token is truly worth."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sum and sum of squares of something, over all ranks."""

    count: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """Mean; 0 of nothing."""
        return self.total / max(self.count, 1.0)

    @property
    def variance(self) -> float:
        """Population variance."""
        return max(self.squares / max(self.count, 1.0) - self.mean**2, 0.0)

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return self.variance**0.5


def reduce_named(sums: dict[str, Tensor], maxima: dict[str, Tensor]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Named vectors added, and named scalars maximised, over all ranks: one collective each."""
    total = all_reduce_sum(torch.cat([x.double() for x in sums.values()])).split([len(x) for x in sums.values()])
    largest = all_reduce_max(torch.stack([x.double() for x in maxima.values()])).tolist()
    return (
        {name: x.tolist() for name, x in zip(sums, total, strict=True)},
        dict(zip(maxima, largest, strict=True)),
    )


def experience_metrics(experience: Experience, config: PPOConfig, *, step: int) -> dict[str, float]:
    """Everything that the data alone says. A collective.

    Args:
        experience: this rank's share.
        config: of the run.
        step: PPO steps done before this one, which is the learner's weights version.
    """
    batch, mask = experience.batch, experience.batch.response_mask
    lengths = mask.sum(1)
    drift = experience.logprobs - batch.behavior_logprobs
    lag = (step - batch.policy_versions).float()
    tokens, responses = _token_columns(experience), _response_columns(experience, lag)
    everyone = torch.ones_like(batch.truncated)[:, None]
    sums = {name: moments(x, mask) for name, x in tokens.items()}
    sums |= {name: moments(x[:, None], everyone) for name, x in responses.items()}
    sums["credit"] = _credit_sums(batch, experience.rewards)
    sums["positive"] = masked_sum((experience.whitened > 0.0).double(), mask)[None]
    sums["product"] = masked_sum(tokens["position"] * experience.rewards, mask)[None]
    sums["absdrift"] = masked_sum(drift.abs(), mask)[None]
    maxima = {
        "score": batch.main.score.max(),
        "-score": (-batch.main.score).max(),
        "reward": experience.rewards.abs().max(),
        "telescoping": experience.telescoping_error.max(),
        "absdrift": drift.masked_fill(~mask, 0.0).abs().max(),
        "importance": experience.importance.max(),
        "length": lengths.max(),
        "lag": lag.max(),
    }
    added, largest = reduce_named(sums, maxima)
    of = {name: Moments(*added[name]) for name in (tokens | responses)}
    metrics = _named(of, added, largest) | _credit_metrics(of, added, config)
    for place in map(score_of, batch.by_model):
        metrics |= {f"{place}/mean": of[place].mean, f"{place}/std": of[place].std}
    for unmeasured in _unmeasured(config):
        del metrics[unmeasured]
    if config.ppo.importance_cap is not None:
        metrics |= {"kl/is_weight/mean": of["importance"].mean, "kl/is_weight/max": largest["importance"]}
    if config.has_critic:
        explained = _explained(of["residual"], of["return"])
        metrics |= {"critic/explained_var": explained, "critic/values/mean": of["value"].mean}
    return metrics


def _unmeasured(config: PPOConfig) -> list[str]:
    """Metrics whose other side was not computed."""
    sampler = [f"kl/sampler/{name}" for name in ("mean", "logp_absdiff_mean", "logp_absdiff_max")] + ["policy/entropy"]
    return (sampler if config.ppo.old_logprobs == "sampler" else []) + ([] if config.has_reference else ["kl/ref/mean"])


def score_of(model: str) -> str:
    """Where the score of a model is logged: ``reward/score``, ``cost/score``, ``reward/NAME/score``."""
    return f"{model}/score" if model in (MAIN, COST) else f"reward/{model}/score"


def _token_columns(experience: Experience) -> dict[str, Tensor]:
    batch = experience.batch
    return {
        "reward": experience.rewards,
        "advantage": experience.advantages,
        "return": experience.returns,
        "value": experience.values,
        "residual": experience.returns - experience.values,
        "entropy": experience.entropy,
        "ref_kl": experience.logprobs - batch.ref_logprobs,
        "drift": experience.logprobs - batch.behavior_logprobs,
        "importance": experience.importance,
        "position": (batch.response_mask.cumsum(1) - 1).to(experience.rewards.dtype),
    }


def _response_columns(experience: Experience, lag: Tensor) -> dict[str, Tensor]:
    batch = experience.batch
    lengths = batch.response_mask.sum(1)
    return {
        "prompt_score": batch.main.prompt_score,
        "total": experience.total_rewards.sum(1),
        "sum": experience.rewards.sum(1),
        "sum_abs": batch.main.token_rewards.abs().sum(1),
        "length": lengths.float(),
        "prompt_length": (batch.attention_mask.sum(1) - lengths).float(),
        "truncated": batch.truncated.float(),
        "lag": lag,
        "alignment_loss": batch.alignment_loss,
    } | {score_of(name): part.score for name, part in batch.by_model.items()}


def _credit_sums(batch: Batch, rewards: Tensor) -> Tensor:
    """Absolute credit: of all tokens, first, last, and EOS; of all prefix differences, and of the jumps at EOS."""
    mask, finished = batch.response_mask, ~batch.truncated
    last, first = last_token(mask), mask & (mask.cumsum(1) == 1)
    size, scores = rewards.abs(), batch.main.scores
    places = [mask, first, last, last & finished[:, None]]
    jumps = eos_jump(scores, mask).abs()[finished]
    return torch.stack([*(masked_sum(size, place) for place in places), r3hf(scores, mask).abs().sum(), jumps.sum()])


def _credit_metrics(of: dict[str, Moments], added: dict[str, list[float]], config: PPOConfig) -> dict[str, float]:
    """Where the credit is: what tells noise, a prompt's offset, or a sparse reward in disguise from real credit."""
    everywhere, first, last, eos, differences, jumps = added["credit"]
    spread = of[score_of(MAIN)].std
    metrics = {
        "r3hf/sum/mean": of["sum"].mean,
        "r3hf/sum_abs_over_std": of["sum_abs"].mean / spread if spread > 0.0 else 0.0,
        "r3hf/first_token_mass": first / everywhere if everywhere else 0.0,
        "r3hf/last_token_mass": last / everywhere if everywhere else 0.0,
        "r3hf/eos_token_mass": eos / everywhere if everywhere else 0.0,
        "policy/positive_advantages": added["positive"][0] / max(of["advantage"].count, 1.0),
    }
    if config.reward.facts.reads_prefixes:
        metrics["r3hf/eos_jump_mass"] = jumps / differences if differences else 0.0
        metrics["r3hf/alignment_loss"] = of["alignment_loss"].mean
    return metrics


def _named(of: dict[str, Moments], added: dict[str, list[float]], largest: dict[str, float]) -> dict[str, float]:
    return {
        "reward/score/min": -largest["-score"],
        "reward/score/max": largest["score"],
        "reward/total/mean": of["total"].mean,
        "r3hf/token_reward/mean": of["reward"].mean,
        "r3hf/token_reward/std": of["reward"].std,
        "r3hf/token_reward/absmax": largest["reward"],
        "r3hf/telescoping_error/max": largest["telescoping"],
        "r3hf/empty_prefix_score/mean": of["prompt_score"].mean,
        "r3hf/position_corr": _correlation(of["position"], of["reward"], added["product"][0]),
        "policy/entropy": of["entropy"].mean,
        "critic/returns/mean": of["return"].mean,
        "critic/advantages/mean": of["advantage"].mean,
        "critic/advantages/std": of["advantage"].std,
        "kl/ref/mean": of["ref_kl"].total / max(of["length"].count, 1.0),
        "kl/sampler/mean": -of["drift"].mean,
        "kl/sampler/logp_absdiff_mean": added["absdrift"][0] / max(of["drift"].count, 1.0),
        "kl/sampler/logp_absdiff_max": largest["absdrift"],
        "rollout/response_length/mean": of["length"].mean,
        "rollout/response_length/max": largest["length"],
        "rollout/truncated_frac": of["truncated"].mean,
        "rollout/eos_frac": 1.0 - of["truncated"].mean,
        "rollout/prompt_length/mean": of["prompt_length"].mean,
        "async/staleness/mean": of["lag"].mean,
        "async/staleness/max": largest["lag"],
    }


def _correlation(x: Moments, y: Moments, product: float) -> float:
    """Pearson correlation from moments; 0 where one does not vary."""
    spread = x.std * y.std
    return (product / max(x.count, 1.0) - x.mean * y.mean) / spread if spread > 0.0 else 0.0


def _explained(residual: Moments, target: Moments) -> float:
    """``1 - Var(returns - values) / Var(returns)``; 0 where the returns do not vary."""
    return 1.0 - residual.variance / target.variance if target.variance > 0.0 else 0.0


def token_rows(
    scored: Sequence[ScoredTrajectory],
    experience: Experience,
    *,
    step: int,
    decode: Callable[..., Any],
    gold_credit: GoldCredit | None = None,
) -> list[dict[str, Any]]:
    """One row a response token, for people: reward scaled and without KL, KL in nats, advantage before whitening.

    Where several models are summed, ``reward/NAME`` is each one's part of the reward, before the missing-EOS rule.

    Args:
        scored: the first rows of the batch, as they came.
        experience: of the batch.
        step: written into each row.
        decode: token ids -> text.
        gold_credit: what is known of each token's worth; without it `gold_credit` is None.

    Raises:
        ConfigError: `gold_credit` does not give one number a token.
    """
    batch = experience.batch
    columns = {
        "reward": experience.rewards,
        "kl": experience.logprobs - batch.ref_logprobs,
        "value": experience.values,
        "advantage": experience.advantages,
        "prefix_score": batch.main.prefix_scores,
        "logprob": experience.logprobs,
    }
    if len(batch.by_model) > 1:
        columns |= {f"reward/{name}": part for name, part in experience.parts.items()}
    table = {name: x[: len(scored)].tolist() for name, x in columns.items()}
    rows = []
    for index, item in enumerate(scored):
        trajectory = item.trajectory
        ids = trajectory.token_ids.tolist()
        start, prompt = trajectory.prompt_len, decode(ids[: trajectory.prompt_len])
        common = {
            "step": step,
            "prompt_id": trajectory.prompt_id,
            "sample": trajectory.sample,
            "prompt": prompt,
            "score": item.main.score,
            "prompt_score": item.main.prompt_score,
            "gold": None,
            "finish": str(trajectory.finish),
        }
        texts = [decode([token]) for token in ids[start:]]
        known = _known(gold_credit, prompt, texts)
        for place, (text, credit) in enumerate(zip(texts, known, strict=True)):
            t = start + place
            own = {"position": place, "token_id": ids[t], "token": text, "gold_credit": credit}
            rows.append(common | own | {name: values[index][t] for name, values in table.items()})
    return rows


def _known(gold_credit: GoldCredit | None, prompt: str, texts: list[str]) -> Sequence[float | None]:
    if gold_credit is None:
        return [None] * len(texts)
    credit = gold_credit(prompt, texts)
    if len(credit) != len(texts):
        raise ConfigError(f"reward.gold_credit: it gives {len(credit)} numbers for {len(texts)} tokens of {prompt!r}")
    return credit
