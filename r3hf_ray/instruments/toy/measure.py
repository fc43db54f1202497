"""How good a reward model's token rewards really are, measured against the toy language's known credit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r3hf_ray.algorithms.credit import auc, pearson, phrase_sums
from r3hf_ray.algorithms.redistribution import redistribute
from r3hf_ray.instruments.toy.language import ToyRequest, gold_credit, phrase_ids
from r3hf_ray.instruments.toy.sampling import ToySample, sample_responses
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.models.load import load_policy, load_reward_model
from r3hf_ray.scoring.prefix_scores import prefix_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditQuality:
    """Agreement of token rewards with known credit; 0.5 is chance for the areas under the curve.

    Tokens (phrases) whose credit is positive against those whose credit is negative, pooled over responses;
    correlations are means over responses.
    """

    token_auc: float
    phrase_auc: float
    """The one to judge by: credit often lands a token early or late."""
    token_pearson: float
    phrase_pearson: float
    responses: int


def reward_model_credit(
    reward_model_folder: Path,
    policy_folder: Path,
    requests: Sequence[ToyRequest],
    *,
    mode: str = "r3hf",
    max_response_tokens: int = 48,
    seed: int = 0,
) -> CreditQuality:
    """Credit quality of a reward model's token rewards on samples of a policy, one to each request."""
    tokenizer = load_tokenizer(policy_folder)
    policy = load_policy(policy_folder, torch.float32)
    reward_model = load_reward_model(reward_model_folder, torch.float32)
    samples = sample_responses(policy, tokenizer, requests, max_response_tokens=max_response_tokens, seed=seed)
    rewards = token_rewards(reward_model, tokenizer, samples, mode=mode)
    return credit_quality(rewards, samples, tokenizer, max_response_tokens=max_response_tokens)


@torch.inference_mode()
def token_rewards(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[ToySample],
    *,
    mode: str = "r3hf",
    batch_size: int = 256,
) -> list[np.ndarray]:
    """Rewards of each response's tokens (ragged, float64)."""
    rewards: list[np.ndarray] = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        rows = [sample.prompt_ids + sample.response_ids for sample in batch]
        width = max(map(len, rows))
        token_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        positions = torch.arange(width)
        attention_mask = positions < torch.tensor([len(row) for row in rows])[:, None]
        prompt_lengths = torch.tensor([len(sample.prompt_ids) for sample in batch])
        response_mask = attention_mask & (positions >= prompt_lengths[:, None])
        finished = torch.tensor([row[-1] == tokenizer.eos_token_id for row in rows])
        given = prefix_scores(reward_model, token_ids, attention_mask, response_mask, suffix_ids=[], finished=finished)
        paid = redistribute(given, response_mask, mode=mode, beta_c=1.0, subtract_prompt_score=True)
        rewards += [row[mask].double().numpy() for row, mask in zip(paid, response_mask, strict=True)]
    return rewards


def credit_quality(
    rewards: Sequence[np.ndarray],
    samples: Sequence[ToySample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_response_tokens: int = 48,
) -> CreditQuality:
    """Compare token rewards (ragged, as from `token_rewards`) with the known credit, by token and summed by phrase."""
    texts = tokenizer.batch_decode([sample.response_ids for sample in samples])
    golds = [
        np.array(gold_credit(sample.request.text, text, max_response_tokens=max_response_tokens))
        for sample, text in zip(samples, texts, strict=True)
    ]
    phrases = [np.array(phrase_ids(text)) for text in texts]
    by_phrase = [phrase_sums(reward, ids) for reward, ids in zip(rewards, phrases, strict=True)]
    gold_by_phrase = [phrase_sums(gold, ids) for gold, ids in zip(golds, phrases, strict=True)]
    return CreditQuality(
        token_auc=_pooled_auc(rewards, golds),
        phrase_auc=_pooled_auc(by_phrase, gold_by_phrase),
        token_pearson=_mean_pearson(rewards, golds),
        phrase_pearson=_mean_pearson(by_phrase, gold_by_phrase),
        responses=len(samples),
    )


def _pooled_auc(rewards: Sequence[np.ndarray], golds: Sequence[np.ndarray]) -> float:
    reward, gold = np.concatenate(rewards), np.concatenate(golds)
    judged = np.abs(gold) > 1e-9
    return auc(reward[judged], gold[judged] > 0)


def _mean_pearson(rewards: Sequence[np.ndarray], golds: Sequence[np.ndarray]) -> float:
    return float(np.nanmean([pearson(reward, gold) for reward, gold in zip(rewards, golds, strict=True)]))
