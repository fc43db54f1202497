import pytest
import torch
from transformers import AutoModelForSequenceClassification

from r3hf_ray.algorithms.redistribution import r3hf
from r3hf_ray.errors import ModelError
from r3hf_ray.models.load import load_reward_model, score_head
from r3hf_ray.scoring.prefix_scores import prefix_scores


@pytest.fixture(scope="module")
def model(reward_folder):
    return load_reward_model(reward_folder, torch.float32)


@pytest.fixture(scope="module")
def plain(reward_folder):
    """The folder's own classifier: of the usual kind transformers', which knows nothing of us."""
    return AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()


def rows(pad=0, width=9):
    """Prompt and response lengths (3, 4) and (2, 6); ids never are 0, the pad id that transformers looks for."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (2, 9), generator=generator)
    ids = torch.nn.functional.pad(ids, (0, width - 9), value=pad)
    lengths, prompts = torch.tensor([[7], [8]]), torch.tensor([[3], [2]])
    position = torch.arange(width)
    ids = torch.where(position < lengths, ids, pad)
    return ids, position < lengths, (position >= prompts) & (position < lengths)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [[], [7], [7, 9, 11]])
def test_one_forward_equals_a_call_for_every_prefix(model, plain, suffix):
    ids, attention, response = rows()
    finished = torch.tensor([True, False])
    scores, _ = prefix_scores(model, ids, attention, response, suffix_ids=suffix, finished=finished)
    for b in range(2):
        prompt, length = int((attention & ~response)[b].sum()), int(attention[b].sum())
        for t in range(prompt, length):
            torch.testing.assert_close(
                scores.prefix[b, t], plain(ids[b : b + 1, : t + 1]).logits[0, 0], rtol=0, atol=2e-6
            )
        torch.testing.assert_close(scores.prompt[b], plain(ids[b : b + 1, :prompt]).logits[0, 0], rtol=0, atol=2e-6)
        whole = torch.cat([ids[b, :length], torch.tensor(suffix if finished[b] else [], dtype=torch.long)])
        torch.testing.assert_close(scores.pooled[b], plain(whole[None]).logits[0, 0], rtol=0, atol=2e-6)
    assert not scores.prefix[~response].any()


@torch.no_grad()
def test_pooled_is_what_transformers_gives_for_the_padded_batch(model, plain):
    ids, attention, response = rows()
    finished = torch.tensor([True, True])
    scores, _ = prefix_scores(model, ids, attention, response, suffix_ids=[], finished=finished)
    torch.testing.assert_close(scores.pooled, plain(ids, attention_mask=attention).logits[:, 0], rtol=0, atol=2e-6)


@torch.no_grad()
def test_padding_changes_nothing_and_pad_may_be_a_real_token(model):
    finished = torch.tensor([True, False])
    first, _ = prefix_scores(model, *rows(), suffix_ids=[7], finished=finished)
    ids, attention, response = rows()
    last = int(ids[0, 6])  # pad with the very token that ends row 0, as where pad == eos
    for pad, width in ((0, 14), (last, 9), (last, 12)):
        ids, attention, response = rows(pad, width)
        again, _ = prefix_scores(model, ids, attention, response, suffix_ids=[7], finished=finished)
        torch.testing.assert_close(again.prefix[:, :9], first.prefix, rtol=0, atol=2e-6)
        torch.testing.assert_close(again.pooled, first.pooled, rtol=0, atol=2e-6)
        torch.testing.assert_close(again.prompt, first.prompt, rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_suffix_needs_no_room_in_the_batch(model):
    ids, attention, response = rows()
    ids, attention, response = ids[1:, :8], attention[1:, :8], response[1:, :8]  # no padding column left
    out, _ = prefix_scores(model, ids, attention, response, suffix_ids=[7, 8], finished=torch.tensor([True]))
    assert out.prefix.shape == (1, 8)
    assert out.pooled[0] != out.prefix[0, -1]


def test_the_head_is_float32_above_a_bfloat16_trunk(reward_folder):
    model = load_reward_model(reward_folder, torch.bfloat16)
    assert score_head(model).weight.dtype == torch.float32
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    out, _ = prefix_scores(model, *rows(), suffix_ids=[7], finished=torch.tensor([True, True]))
    assert out.prefix.dtype == out.pooled.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("suffix", [[], [7, 9]])
def test_attention_of_the_last_response_token_comes_with_the_same_scores(reward_folder, model, suffix):
    """A row alone, without suffix or padding, through transformers' own classifier with eager attention."""
    eager = load_reward_model(reward_folder, torch.float32, attention="eager")
    ids, attention, response = rows()
    options = {"suffix_ids": suffix, "finished": torch.tensor([True, False])}
    scores, weights = prefix_scores(eager, ids, attention, response, **options, maps=True)
    expected, _ = prefix_scores(model, ids, attention, response, **options)
    for name in ("prefix", "prompt", "pooled"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=0, atol=2e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, attn_implementation="eager").eval()
    for b in range(2):
        length = int(attention[b].sum())
        maps = plain(ids[b : b + 1, :length], output_attentions=True).attentions[-1]
        last = maps[0, :, -1].mean(0) * response[b, :length]
        torch.testing.assert_close(weights[b, :length], last, rtol=0, atol=2e-6)
        assert not weights[b, length:].any()


def test_a_model_that_hides_its_attention_is_refused(model):
    ids, attention, response = rows()
    with pytest.raises(ModelError, match=r"reward\.mode = abc"):
        prefix_scores(model, ids, attention, response, suffix_ids=[], finished=torch.tensor([True, False]), maps=True)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [[], [7, 9]])
def test_a_running_sum_pays_each_token_what_the_head_says_there(sum_models, suffix):
    model = load_reward_model(sum_models("qwen2"), torch.float32)
    ids, attention, response = rows()
    finished = torch.tensor([True, False])
    scores, _ = prefix_scores(model, ids, attention, response, suffix_ids=suffix, finished=finished)
    rewards = r3hf(scores, response, subtract_prompt_score=True)
    for b in range(2):
        length = int(attention[b].sum())
        whole = torch.cat([ids[b, :length], torch.tensor(suffix if finished[b] else [], dtype=torch.long)])
        said = model.token_score(model.model(input_ids=whole[None]).last_hidden_state)[0, :, 0]
        expected = said[:length].clone()
        expected[-1] += said[length:].sum()  # the jump of the template behind EOS lands on the last token
        torch.testing.assert_close(rewards[b, :length], expected * response[b, :length], rtol=0, atol=2e-6)
    total = scores.pooled - scores.prompt
    torch.testing.assert_close(rewards.sum(1), total, rtol=0, atol=2e-6)
