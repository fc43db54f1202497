"""The records of a run, `metrics.jsonl` and `events.jsonl`, and what every metric means.

The JSON lines are the source of truth; wandb, the display and the report only show them.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from r3hf_ray.records.jsonl import TIME, read_jsonl

STEP = "train/global_step"
ATTEMPT = "attempt"


@dataclass(frozen=True, slots=True)
class Metric:
    """What one metric is.

    Example: ``Metric("nats a response", "KL from the reference, ...")``
    """

    unit: str
    """Unit of the value; empty for a pure number."""
    meaning: str
    """One sentence for a reader who has not seen the code."""


METRICS: dict[str, Metric] = {
    "reward/score/mean": Metric("score", "Reward model's score of a response, R(x, y): mean over the batch."),
    "reward/score/std": Metric("score", "Spread of the reward model's score over the batch."),
    "reward/score/min": Metric("score", "Lowest score of the batch."),
    "reward/score/max": Metric("score", "Highest score of the batch."),
    "reward/total/mean": Metric("scaled reward", "What PPO maximises: a response's scaled reward minus the KL price."),
    "reward/gold/mean": Metric("gold", "An independent judge's score of the training batch; never trained on."),
    "cost/score/mean": Metric("cost", "Cost model's score of a response, more being worse: mean over the batch."),
    "cost/score/std": Metric("cost", "Spread of the cost model's score over the batch."),
    "cost/violation": Metric("cost", "Mean cost minus cost.limit; above 0 the limit is broken."),
    "cost/multiplier": Metric("scaled reward", "Price of a standard deviation of cost in this step: lambda."),
    "r3hf/token_reward/mean": Metric("scaled reward", "Mean reward of one response token."),
    "r3hf/token_reward/std": Metric("scaled reward", "Spread of the reward over response tokens."),
    "r3hf/token_reward/absmax": Metric("scaled reward", "Largest absolute reward of one token."),
    "r3hf/telescoping_error/max": Metric("relative", "Gap between summed token rewards and the sequence reward."),
    "r3hf/empty_prefix_score/mean": Metric("score", "Score of the prompt alone, R(x, empty), subtracted at token 1."),
    "r3hf/sum/mean": Metric("scaled reward", "What a response's token rewards sum to, before the KL: mean."),
    "r3hf/sum_abs_over_std": Metric("std of the score", "Absolute token rewards of a response; much above 1 cancels."),
    "r3hf/first_token_mass": Metric("share", "Part of all absolute reward on the first token of a response."),
    "r3hf/last_token_mass": Metric("share", "Part of all absolute reward on the last token; 1 is the sparse baseline."),
    "r3hf/eos_token_mass": Metric("share", "Part of all absolute reward on EOS."),
    "r3hf/eos_jump_mass": Metric("share", "The jump at EOS among all prefix differences, before reward.eos_jump."),
    "r3hf/alignment_loss": Metric("share", "Response tokens that another tokenizer's reward model could not place."),
    "r3hf/position_corr": Metric("correlation", "Correlation of a token's reward with its position in the response."),
    "policy/loss": Metric("", "Clipped policy loss a token."),
    "policy/clipfrac": Metric("share", "Tokens whose probability ratio left the clip range."),
    "policy/dual_clipfrac": Metric("share", "Tokens at the second clip (ppo.dual_clip)."),
    "policy/kl_loss": Metric("nats a token", "Estimated KL to the reference inside the loss (ppo.kl_in = loss)."),
    "policy/positive_advantages": Metric("share", "Tokens whose advantage, as the loss uses it, is positive."),
    "policy/approx_kl": Metric("nats a token", "Estimated KL between the policy before and after the update."),
    "policy/entropy": Metric("nats a token", "Entropy of the policy's next-token distribution."),
    "policy/ratio/mean": Metric("", "Mean probability ratio, new to old; near 1."),
    "policy/ratio/max": Metric("", "Largest probability ratio of a token."),
    "policy/grad_norm": Metric("", "Norm of the policy's gradient before clipping."),
    "policy/lr": Metric("", "Learning rate of the policy."),
    "policy/eps_share": Metric("share", "Part of Adam's update of the policy that optimizer.eps takes away."),
    "critic/loss": Metric("", "Clipped value loss a token."),
    "critic/clipfrac": Metric("share", "Tokens whose value change was clipped."),
    "critic/explained_var": Metric("share", "Part of the returns' variance the critic predicts; 1 is perfect."),
    "critic/grad_norm": Metric("", "Norm of the critic's gradient before clipping."),
    "critic/eps_share": Metric("share", "Part of Adam's update of the critic that optimizer.eps takes away."),
    "critic/values/mean": Metric("scaled reward", "Mean predicted value of a state."),
    "critic/returns/mean": Metric("scaled reward", "Mean return the critic is trained on."),
    "critic/advantages/mean": Metric("scaled reward", "Mean advantage before whitening."),
    "critic/advantages/std": Metric("scaled reward", "Spread of advantages before whitening."),
    "kl/ref/mean": Metric("nats a response", "How far the policy has moved from the frozen reference."),
    "kl/coef": Metric("scaled reward a nat", "Price of one nat of KL inside the reward."),
    "kl/sampler/mean": Metric("nats a token", "KL between the learner's and the sampler's view of the same tokens."),
    "kl/sampler/logp_absdiff_mean": Metric("nats", "Mean absolute gap of a token's logprob, learner against sampler."),
    "kl/sampler/logp_absdiff_max": Metric("nats", "Largest such gap in the batch."),
    "kl/is_weight/mean": Metric("", "Mean truncated importance weight, learner against sampler."),
    "kl/is_weight/max": Metric("", "Largest truncated importance weight."),
    "rollout/response_length/mean": Metric("tokens", "Mean length of a response, EOS included."),
    "rollout/response_length/max": Metric("tokens", "Longest response of the batch."),
    "rollout/length_drift": Metric("relative", "Change of the mean response length since the first step."),
    "rollout/prompt_length/mean": Metric("tokens", "Mean length of a prompt."),
    "rollout/truncated_frac": Metric("share", "Responses cut at the token limit."),
    "rollout/eos_frac": Metric("share", "Responses the policy ended itself."),
    "rollout/failed": Metric("samples", "Samples of the step that failed in every attempt; never trained on."),
    "rollout/retried": Metric("samples", "Samples of the step made again after a failed attempt."),
    "rollout/workers": Metric("actors", "Rollout actors alive."),
    "fleet/rollout_actors": Metric("actors", "Rollout actors that get work."),
    "fleet/reward_actors": Metric("actors", "Reward actors that get work."),
    "async/staleness/mean": Metric("steps", "Weights versions between sampling a response and learning from it: mean."),
    "async/staleness/max": Metric("steps", "The same, largest; bounded by rollout.max_lag."),
    "sync/version": Metric("version", "Weights version the samplers proved to have loaded."),
    "sync/seconds": Metric("s", "Time to publish and load one weights version."),
    "kl/sampler/start": Metric(
        "nats", "Estimated KL from sampler to learner before the first update, where ppo.old_logprobs = sampler."
    ),
    "sync/bytes": Metric("bytes", "Size of one weights version."),
    "sync/probe_gap": Metric("nats", "Mean logprob gap, learner against sampler, on a fixed probe after the sync."),
    "sync/mismatch": Metric("tensors", "Tensors whose fingerprint did not match after loading; must stay 0."),
    "time/step": Metric("s", "One PPO step, wall clock."),
    "time/rollout": Metric("s", "Generating the batch with vLLM."),
    "time/reward": Metric("s", "Reward model and reference on the batch."),
    "time/wait_rollout": Metric("s", "Learner idle, waiting for scored responses."),
    "time/evaluate": Metric("s", "Learner: logprobs and values of the batch before the update."),
    "time/advantage": Metric("s", "Learner: KL penalty, advantages, returns."),
    "time/train_policy": Metric("s", "Learner: policy updates."),
    "time/train_critic": Metric("s", "Learner: critic updates."),
    "time/sync": Metric("s", "Learner: gather, fingerprint and publish the new weights."),
    "perf/tokens_per_sec": Metric("tokens/s", "Response tokens trained on, a second of wall clock."),
    "perf/padding": Metric("ratio", "Padded tokens that the updates computed, a real one; 1 is none."),
    "eval/heldout/score/mean": Metric("score", "Reward model's score on held-out prompts."),
    "eval/heldout/cost/score/mean": Metric("cost", "Cost model's score on held-out prompts."),
    "eval/heldout/gold/mean": Metric("gold", "Independent judge's score on held-out prompts."),
    "eval/heldout/gold/sem": Metric("gold", "Standard error of that mean."),
    "eval/heldout/response_length/mean": Metric("tokens", "Mean response length on held-out prompts."),
    "eval/heldout/eos_frac": Metric("share", "Held-out responses the policy ended itself."),
}
"""Every metric of a PPO run, in the order of reading; the report and the docs are made from it."""
_OF_A_MODEL: dict[str, Metric] = {
    r"reward/(\w+)/score/mean": Metric("score", "Score of the reward model {}: mean over the batch."),
    r"reward/(\w+)/score/std": Metric("score", "Spread of the score of the reward model {} over the batch."),
    r"eval/heldout/(\w+)/score/mean": Metric("score", "Score of the reward model {} on held-out prompts."),
    r"eval/heldout/(\w+)/score/sem": Metric("score", "Standard error of that mean of the reward model {}."),
}
"""Those of `model.rewards`, by a pattern of their names."""


def describe(name: str) -> Metric:
    """What a metric is, also one that is named after a reward model.

    Example: ``describe("reward/brevity/score/mean").meaning == "Score of the reward model brevity: mean over the
    batch."``
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, metric in _OF_A_MODEL.items():
        if found := re.fullmatch(pattern, name):
            return replace(metric, meaning=metric.meaning.format(found[1]))
    return Metric("", "Not in the catalogue of r3hf_ray.records.metrics.")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """One row a step of `folder/metrics.jsonl`, ascending; null becomes NaN.

    A restarted run does steps again: the last attempt of a step replaces earlier ones. Rows of the same attempt (a
    training row and an evaluation row) are merged; so is an evaluation that a restart did again for a step it kept.
    """
    by_step: dict[int, dict[str, float]] = {}
    for row in read_jsonl(folder / "metrics.jsonl"):
        values = {key: math.nan if value is None else float(value) for key, value in row.items()}
        seen = by_step.get(int(row[STEP]), {})
        evaluation = all(key.startswith("eval/") for key in row.keys() - {STEP, ATTEMPT, TIME})
        merge = evaluation or seen.get(ATTEMPT) == row.get(ATTEMPT)
        by_step[int(row[STEP])] = seen | values if merge else values
    return [by_step[step] for step in sorted(by_step)]


def next_attempt(folder: Path) -> int:
    """The attempt number a (re)started run writes: one more than the last in `folder/metrics.jsonl`, 0 at first."""
    return max((int(row.get(ATTEMPT, 0)) for row in read_jsonl(folder / "metrics.jsonl")), default=-1) + 1
