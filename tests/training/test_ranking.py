import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from r3hf_ray.draws import stream_row
from r3hf_ray.models.running_sum import RunningSumConfig, RunningSumForSequenceClassification
from r3hf_ray.training.ranking import cut_fraction, cut_length, pair_accuracy, scores_of_prefixes, train_ranked
from r3hf_ray.types import RankedGroup

PAD = 0
HEADS = pytest.mark.parametrize("head", ["last_token", "running_sum"])


def make_model(seed: int = 0, head: str = "last_token") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=PAD, eos_token_id=2,
    )  # fmt: skip
    if head == "last_token":
        return LlamaForSequenceClassification(config)
    model = RunningSumForSequenceClassification(RunningSumConfig(text_config=config))
    torch.nn.init.normal_(model.token_score.weight, std=0.05)
    return model


def make_groups(count: int, size: int, seed: int = 0) -> list[RankedGroup]:
    """A response with more 7s wins."""
    rng = random.Random(seed)
    groups = []
    for _ in range(count):
        sequences = [[1, *rng.choices(range(3, 12), k=rng.randrange(3, 10)), 2] for _ in range(size)]
        sevens = [ids.count(7) for ids in sequences]
        pairs = [(a, b) for a in range(size) for b in range(size) if sevens[a] > sevens[b]]
        if pairs:
            groups.append(RankedGroup(prompt_tokens=1, sequences=sequences, pairs=pairs))
    return groups


def parameters(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def whole_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    return scores_of_prefixes(model, sequences, [(i, len(ids)) for i, ids in enumerate(sequences)], pad_id=PAD)


def test_scores_are_the_plain_models_at_the_last_token() -> None:
    model = make_model().eval()
    sequences = [[1, 5, 6, 2], [1, 5], [1, 9, 8, 7, 6, 5, 2], [1, 5, 0, 0]]  # the last one ends with pad ids of its own
    scores = whole_scores(model, sequences)
    assert scores.dtype == torch.float32
    for ids, score in zip(sequences, scores.tolist(), strict=True):
        alone = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, -1, 0]
        assert score == pytest.approx(alone.item(), abs=1e-5)
    usual = model(input_ids=torch.tensor([sequences[0]])).logits[0, 0]
    assert scores[0].item() == pytest.approx(usual.item(), abs=1e-5)


def test_first_step_is_the_bradley_terry_loss_over_the_given_pairs() -> None:
    model = make_model()
    pairs = [(0, 1), (2, 1), (1, 0), (2, 0)]
    group = RankedGroup(prompt_tokens=1, sequences=[[1, 5, 2], [1, 6, 6, 2], [1, 7, 2]], pairs=pairs)
    a, b, c = whole_scores(model, group.sequences).tolist()
    seen: list[dict[str, float]] = []
    metrics = train_ranked(
        model, [group], pad_id=PAD, learning_rate=1e-3, steps=1, groups_per_step=1, seed=0, center_coef=0.01,
        on_step=lambda _, row: seen.append(row),
    )  # fmt: skip
    margins, totals = [a - b, c - b, b - a, c - a], [a + b, c + b, b + a, c + a]
    losses = [math.log1p(math.exp(-m)) + 0.01 * t * t for m, t in zip(margins, totals, strict=True)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 4)
    assert seen == [metrics]


@HEADS
@torch.no_grad()
def test_scores_of_cut_sequences_are_those_of_the_cut_sequences_alone(head: str) -> None:
    model = make_model(head=head).eval()
    sequences = [[1, 5, 6, 9, 2], [1, 5, 7], [1, 9, 8, 7, 6, 5, 2]]
    prefixes = [(i, n) for i, ids in enumerate(sequences) for n in range(1, len(ids) + 1)]
    scores = scores_of_prefixes(model, sequences, prefixes, pad_id=PAD)
    alone = [model(input_ids=torch.tensor([sequences[i][:n]])).logits.item() for i, n in prefixes]
    torch.testing.assert_close(scores, torch.tensor(alone), rtol=0, atol=2e-6)
    whole = whole_scores(model, sequences)
    torch.testing.assert_close(whole, scores[[4, 7, 14]], rtol=0, atol=1e-6)


def test_a_cut_leaves_something_and_takes_something() -> None:
    assert {cut_length(3, 3 + 1, fraction / 10) for fraction in range(10)} == {4}, "one token stays whole"
    lengths = [cut_length(3, 3 + 6, fraction / 100) for fraction in range(100)]
    assert [lengths.count(n) for n in range(4, 9)] == [20] * 5, "every cut is equally likely"
    fractions = [cut_fraction(0, step, pair) for step in range(50) for pair in range(20)]
    assert len(set(fractions)) == 1000 and all(0 <= fraction < 1 for fraction in fractions)
    assert sum(fractions) / 1000 == pytest.approx(0.5, abs=0.05)
    again, other_seed = ([cut_fraction(seed, 0, pair) for pair in range(20)] for seed in (0, 1))
    assert again == fractions[:20] != other_seed


@HEADS
@pytest.mark.parametrize("prefix_weight", [0.0, 0.5])
def test_one_step_is_plain_torch_on_sequences_forwarded_alone(head: str, prefix_weight: float) -> None:
    """Loss, gradient and step by hand, each whole and each cut response in a forward of its own."""
    groups, seed = make_groups(3, 4, seed=5), 7
    model, plain = make_model(head=head), make_model(head=head)
    settings = {"pad_id": PAD, "learning_rate": 1e-3, "groups_per_step": 3, "center_coef": 0.01}
    metrics = train_ranked(model, groups, steps=1, seed=seed, prefix_weight=prefix_weight, **settings)

    def score(ids: list[int]) -> torch.Tensor:
        return plain(input_ids=torch.tensor([ids])).logits[0, 0]

    losses, cut_losses, cut_wins = [], [], []
    for position in range(3):
        group = groups[stream_row(seed, position, 3)]
        for index, (winner, loser) in enumerate(group.pairs):
            first, second = group.sequences[winner], group.sequences[loser]
            margin, total = score(first) - score(second), score(first) + score(second)
            losses.append(-logsigmoid(margin) + 0.01 * total**2)
            fraction = cut_fraction(seed, position, index)
            cut = [score(ids[: cut_length(1, len(ids), fraction)]) for ids in (first, second)]
            cut_losses.append(-logsigmoid(cut[0] - cut[1]))
            cut_wins.append(float(cut[0] > cut[1]))
    loss = torch.stack(losses).mean() + prefix_weight * torch.stack(cut_losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert ("prefix_loss" in metrics) == ("prefix_accuracy" in metrics) == bool(prefix_weight)
    if prefix_weight:
        assert metrics["prefix_loss"] == pytest.approx(torch.stack(cut_losses).mean().item(), rel=1e-5)
        assert metrics["prefix_accuracy"] == pytest.approx(sum(cut_wins) / len(cut_wins))
    torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0).step()
    assert torch.allclose(parameters(model), parameters(plain), atol=1e-4)


@pytest.mark.parametrize("microbatch_size", [1, 9, 1000])
@pytest.mark.parametrize("prefix_weight", [0.0, 0.5])
def test_microbatches_change_nothing(microbatch_size: int, prefix_weight: float) -> None:
    groups = make_groups(8, 4)
    models = [make_model(), make_model()]
    settings = {"pad_id": PAD, "learning_rate": 1e-3, "steps": 2, "groups_per_step": 6, "seed": 3}
    settings["prefix_weight"] = prefix_weight
    for model, size in zip(models, (64, microbatch_size), strict=True):
        train_ranked(model, groups, microbatch_size=size, **settings)
    assert torch.allclose(parameters(models[0]), parameters(models[1]), atol=2e-5)


@pytest.mark.parametrize(("head", "prefix_weight"), [("last_token", 0.0), ("last_token", 0.5), ("running_sum", 0.0)])
def test_it_learns_a_noisy_rule_and_is_seeded(head: str, prefix_weight: float) -> None:
    groups, heldout = make_groups(150, 5), make_groups(40, 3, seed=9)
    swapped = [replace(g, pairs=[(b, a) for a, b in g.pairs]) for g in groups[:15]]
    model = make_model(head=head)
    before = pair_accuracy(model, heldout, pad_id=PAD)
    settings = {"pad_id": PAD, "learning_rate": 3e-3, "steps": 60, "groups_per_step": 8}
    settings["prefix_weight"] = prefix_weight
    metrics = train_ranked(model, swapped + groups[15:], seed=0, **settings)
    assert pair_accuracy(model, heldout, pad_id=PAD) > max(0.9, before)
    assert metrics["loss"] < math.log(2) * (1 + prefix_weight)
    same, other = make_model(head=head), make_model(head=head)
    train_ranked(same, swapped + groups[15:], seed=0, **settings)
    train_ranked(other, swapped + groups[15:], seed=1, **settings)
    assert torch.equal(parameters(same), parameters(model))
    assert not torch.equal(parameters(other), parameters(model))


def test_pair_accuracy_counts_pairs_and_halves_ties() -> None:
    model = make_model()
    high, low = [1, 5, 2], [1, 6, 2]
    if whole_scores(model, [high]) < whole_scores(model, [low]):
        high, low = low, high
    right = RankedGroup(prompt_tokens=1, sequences=[high, low], pairs=[(0, 1)])
    wrong = replace(right, pairs=[(1, 0), (1, 0)])
    tie = replace(right, sequences=[high, high])
    assert pair_accuracy(model, [right], pad_id=PAD) == 1.0
    assert pair_accuracy(model, [right, wrong], pad_id=PAD, microbatch_size=1) == pytest.approx(1 / 3)
    assert pair_accuracy(model, [tie], pad_id=PAD) == 0.5


def test_groups_without_pairs_are_refused() -> None:
    settings = {"pad_id": PAD, "learning_rate": 1e-3, "steps": 1, "groups_per_step": 1, "seed": 0}
    for groups in ([], [RankedGroup(prompt_tokens=1, sequences=[[1, 2]], pairs=[])]):
        with pytest.raises(ValueError, match="at least one"):
            train_ranked(make_model(), groups, **settings)
    with pytest.raises(ValueError, match="a response is empty"):
        train_ranked(
            make_model(), [RankedGroup(prompt_tokens=2, sequences=[[1, 5, 2], [1, 5]], pairs=[(0, 1)])], **settings
        )


@HEADS
def test_bfloat16_rounds_the_trunk_and_still_learns(head: str) -> None:
    """The weights and their step stay in float32; so does the head, whose scores are not all bfloat16 numbers."""
    groups, heldout = make_groups(150, 5), make_groups(40, 3, seed=9)
    settings = {"pad_id": PAD, "learning_rate": 3e-3, "groups_per_step": 8, "seed": 0, "prefix_weight": 0.5}
    first = {
        dtype: train_ranked(make_model(head=head), groups, steps=1, **settings, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert first[torch.float32] == train_ranked(make_model(head=head), groups, steps=1, **settings)
    rounded, exact = first[torch.bfloat16]["loss"], first[torch.float32]["loss"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)
    model = make_model(head=head)
    train_ranked(model, groups, steps=60, **settings, dtype=torch.bfloat16)
    assert pair_accuracy(model, heldout, pad_id=PAD) > 0.9
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    scores = scores_of_prefixes(model, [[1, 7, 8, 2]], [(0, 2), (0, 4)], pad_id=PAD, dtype=torch.bfloat16)
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = make_model()
    with torch.no_grad():
        model.score.weight.fill_(math.inf)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match="step 1"):
        train_ranked(model, make_groups(2, 3), pad_id=PAD, learning_rate=1e-3, steps=1, groups_per_step=2, seed=0)
    assert torch.equal(parameters(model), before)


SETTINGS = {"pad_id": PAD, "learning_rate": 1e-3, "steps": 3, "groups_per_step": 3, "seed": 3, "prefix_weight": 0.5}


def test_two_ranks_equal_one_process(run_ranks: Callable[..., list[dict]]) -> None:
    """Three groups a step over two ranks: shares of unlike size, so averaging over ranks would show."""

    def on_a_rank(rank: int) -> dict:
        """Its seed is its rank, since rank 0's parameters must be the ones that count."""
        model = make_model(seed=rank)
        metrics = train_ranked(model, make_groups(8, 4), **SETTINGS)
        accuracy = pair_accuracy(model, make_groups(5, 4, seed=1), pad_id=PAD)
        return {"parameters": parameters(model), "metrics": metrics, "accuracy": accuracy}

    first, second = run_ranks(on_a_rank)
    assert torch.equal(first["parameters"], second["parameters"])
    model = make_model(seed=0)
    metrics = train_ranked(model, make_groups(8, 4), **SETTINGS)
    assert torch.allclose(first["parameters"], parameters(model), atol=2e-5)
    for result in (first, second):
        assert result["metrics"] == pytest.approx(metrics, rel=1e-4)
        assert result["accuracy"] == pair_accuracy(model, make_groups(5, 4, seed=1), pad_id=PAD)
