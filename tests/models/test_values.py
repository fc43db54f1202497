import pytest
import torch

from r3hf_ray.models import checkpoint
from r3hf_ray.models.load import load_reward_model
from r3hf_ray.models.values import critic_from_policy, critic_from_reward_model, state_values
from r3hf_ray.scoring.prefix_scores import prefix_scores


@pytest.fixture
def rows():
    torch.manual_seed(3)
    ids = torch.randint(2, 40, (2, 8))
    attention = torch.arange(8) < torch.tensor([[8], [6]])
    response = attention & (torch.arange(8) >= torch.tensor([[3], [2]]))
    return ids, attention, response


@torch.no_grad()
def test_a_kept_head_gives_the_normalised_score_of_the_prefix_before_each_token(reward_folder, rows):
    response = rows[2]
    critic = critic_from_reward_model(reward_folder, torch.float32, keep_head=True, mean=0.3, scale=2.0)
    values = state_values(critic, *rows)
    scores, _ = prefix_scores(
        load_reward_model(reward_folder, torch.float32), *rows, suffix_ids=[], finished=torch.tensor([True, False])
    )
    for b, t in response.nonzero().tolist():
        before = scores.prefix[b, t - 1] if response[b, t - 1] else scores.prompt[b]
        torch.testing.assert_close(values[b, t], (before - 0.3) / 2.0)
    assert not values[~response].any()


@torch.no_grad()
def test_zero_heads_start_at_zero_whatever_the_scale(tiny_models, reward_folder, rows):
    for critic in (
        critic_from_policy(tiny_models.policy, torch.float32),
        critic_from_reward_model(reward_folder, torch.float32, keep_head=False, mean=5.0, scale=2.0),
    ):
        assert not state_values(critic, *rows).any()
        assert not critic.training and not critic.summed


@torch.no_grad()
def test_a_checkpoint_says_whether_the_head_adds_up(tiny_models, sum_models, rows, tmp_path):
    """Whatever critic it is loaded into: the meaning of a head travels with its weights."""
    critic = critic_from_reward_model(sum_models("llama"), torch.float32, keep_head=True, mean=0.1, scale=2.0)
    checkpoint.save(tmp_path, modules={"critic": critic}, optimizers={}, extra={})
    other = critic_from_policy(tiny_models.policy, torch.float32)
    checkpoint.load(tmp_path, modules={"critic": other}, optimizers={})
    assert torch.equal(state_values(other, *rows), state_values(critic, *rows))
    assert state_values(critic, *rows).any()


def test_a_zero_head_still_learns(tiny_models, rows):
    critic = critic_from_policy(tiny_models.policy, torch.float32)
    state_values(critic, *rows).sum().backward()
    assert critic.head.weight.grad.abs().sum() > 0


def test_the_head_stays_float32_above_a_bfloat16_trunk(tiny_models, rows):
    critic = critic_from_reward_model(tiny_models.reward, torch.bfloat16, keep_head=True, mean=0.0, scale=1.0)
    assert critic.head.weight.dtype == torch.float32
    assert state_values(critic, *rows).dtype == torch.float32


def test_a_scale_that_is_not_positive_is_refused(tiny_models):
    with pytest.raises(ValueError, match="scale"):
        critic_from_reward_model(tiny_models.reward, torch.float32, keep_head=True, mean=0.0, scale=0.0)
