"""Rows of samples, as people read them: what they say of a token's worth and of the prompt's own score."""

import numpy as np
import pytest
import torch

from r3hf_ray.algorithms.batching import collate
from r3hf_ray.errors import ConfigError
from r3hf_ray.training.experience import Experience
from r3hf_ray.training.ppo_metrics import token_rows
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory, Trajectory

WORDS = ["<pad>", "<bos>", "cats", "sleep", "<eos>"]


@pytest.fixture
def given():
    """Two responses, of two tokens and of one, and the experience made of them."""

    def scored(ids, prompt_len, score):
        zeros = np.zeros(len(ids), dtype=np.float32)
        return ScoredTrajectory(
            trajectory=Trajectory(
                prompt_id=score,
                sample=0,
                attempt=0,
                policy_version=0,
                prompt_len=prompt_len,
                finish=Finish.EOS,
                token_ids=np.array(ids, dtype=np.int32),
                behavior_logprobs=zeros,
            ),
            ref_logprobs=zeros,
            by_model={
                MAIN: ModelScores(
                    token_rewards=zeros, prefix_scores=zeros, score=float(score), prompt_score=0.25 * score
                )
            },
        )

    items = [scored([1, 2, 3, 4], 2, 2), scored([1, 2, 4], 2, 5)]
    batch = collate(items, pad_id=0)
    zeros = torch.zeros_like(batch.ref_logprobs)
    experience = Experience(
        batch=batch,
        logprobs=zeros,
        entropy=zeros,
        values=zeros,
        parts={},
        rewards=zeros,
        total_rewards=zeros,
        advantages=zeros,
        whitened=zeros,
        returns=zeros,
        importance=zeros,
        kl_price=zeros,
        telescoping_error=torch.zeros(2),
    )
    return items, experience


def decode(ids):
    return " ".join(WORDS[i] for i in ids)


def test_known_credit_goes_to_its_tokens(given):
    asked = []

    def worth(prompt, tokens):
        asked.append((prompt, tokens))
        return [float(len(token)) for token in tokens]

    rows = token_rows(*given, step=1, decode=decode, gold_credit=worth)
    assert asked == [("<bos> cats", ["sleep", "<eos>"]), ("<bos> cats", ["<eos>"])]
    assert [(row["token"], row["position"], row["gold_credit"]) for row in rows] == [
        ("sleep", 0, 5.0),
        ("<eos>", 1, 5.0),
        ("<eos>", 0, 5.0),
    ]
    assert [row["prompt_score"] for row in rows] == [0.5, 0.5, 1.25]


def test_without_a_judge_nothing_is_known(given):
    assert {row["gold_credit"] for row in token_rows(*given, step=1, decode=decode)} == {None}


def test_a_judge_gives_one_number_a_token(given):
    with pytest.raises(ConfigError, match=r"reward\.gold_credit: it gives 1 numbers for 2 tokens of '<bos> cats'"):
        token_rows(*given, step=1, decode=decode, gold_credit=lambda prompt, tokens: [1.0])
