import math
import random
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForSequenceClassification

from r3hf_ray.training.ranking import RankedGroup, last_token_scores, pair_accuracy, train_ranked

PAD = 0


def make_model(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=PAD, eos_token_id=2,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def make_groups(count: int, size: int, seed: int = 0) -> list[RankedGroup]:
    """A response with more 7s wins."""
    rng = random.Random(seed)
    groups = []
    for _ in range(count):
        sequences = [[1, *rng.choices(range(3, 12), k=rng.randrange(3, 10)), 2] for _ in range(size)]
        sevens = [ids.count(7) for ids in sequences]
        pairs = [(a, b) for a in range(size) for b in range(size) if sevens[a] > sevens[b]]
        if pairs:
            groups.append(RankedGroup(sequences=sequences, pairs=pairs))
    return groups


def parameters(model: LlamaForSequenceClassification) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_scores_are_the_plain_models_at_the_last_token() -> None:
    model = make_model().eval()
    sequences = [[1, 5, 6, 2], [1, 5], [1, 9, 8, 7, 6, 5, 2], [1, 5, 0, 0]]  # the last one ends with pad ids of its own
    scores = last_token_scores(model, sequences, pad_id=PAD)
    assert scores.dtype == torch.float32
    for ids, score in zip(sequences, scores.tolist(), strict=True):
        alone = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, -1, 0]
        assert score == pytest.approx(alone.item(), abs=1e-5)
    usual = model(input_ids=torch.tensor([sequences[0]])).logits[0, 0]
    assert scores[0].item() == pytest.approx(usual.item(), abs=1e-5)


def test_first_step_is_the_bradley_terry_loss_over_the_given_pairs() -> None:
    model = make_model()
    group = RankedGroup(sequences=[[1, 5, 2], [1, 6, 6, 2], [1, 7, 2]], pairs=[(0, 1), (2, 1), (1, 0), (2, 0)])
    a, b, c = last_token_scores(model, group.sequences, pad_id=PAD).tolist()
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


@pytest.mark.parametrize("microbatch_size", [1, 9, 1000])
def test_microbatches_change_nothing(microbatch_size: int) -> None:
    groups = make_groups(8, 4)
    models = [make_model(), make_model()]
    settings = {"pad_id": PAD, "learning_rate": 1e-3, "steps": 2, "groups_per_step": 6, "seed": 3}
    for model, size in zip(models, (64, microbatch_size), strict=True):
        train_ranked(model, groups, microbatch_size=size, **settings)
    assert torch.allclose(parameters(models[0]), parameters(models[1]), atol=2e-5)


def test_it_learns_a_noisy_rule_and_is_seeded() -> None:
    groups, heldout = make_groups(150, 5), make_groups(40, 3, seed=9)
    swapped = [RankedGroup(sequences=g.sequences, pairs=[(b, a) for a, b in g.pairs]) for g in groups[:15]]
    model = make_model()
    before = pair_accuracy(model, heldout, pad_id=PAD)
    settings = {"pad_id": PAD, "learning_rate": 3e-3, "steps": 60, "groups_per_step": 8}
    metrics = train_ranked(model, swapped + groups[15:], seed=0, **settings)
    assert pair_accuracy(model, heldout, pad_id=PAD) > max(0.9, before)
    assert metrics["loss"] < math.log(2)
    same, other = make_model(), make_model()
    train_ranked(same, swapped + groups[15:], seed=0, **settings)
    train_ranked(other, swapped + groups[15:], seed=1, **settings)
    assert torch.equal(parameters(same), parameters(model))
    assert not torch.equal(parameters(other), parameters(model))


def test_pair_accuracy_counts_pairs_and_halves_ties() -> None:
    model = make_model()
    high, low = [1, 5, 2], [1, 6, 2]
    if last_token_scores(model, [high], pad_id=PAD) < last_token_scores(model, [low], pad_id=PAD):
        high, low = low, high
    right = RankedGroup(sequences=[high, low], pairs=[(0, 1)])
    wrong = RankedGroup(sequences=[high, low], pairs=[(1, 0), (1, 0)])
    tie = RankedGroup(sequences=[high, high], pairs=[(0, 1)])
    assert pair_accuracy(model, [right], pad_id=PAD) == 1.0
    assert pair_accuracy(model, [right, wrong], pad_id=PAD, microbatch_size=1) == pytest.approx(1 / 3)
    assert pair_accuracy(model, [tie], pad_id=PAD) == 0.5


def test_groups_without_pairs_are_refused() -> None:
    settings = {"pad_id": PAD, "learning_rate": 1e-3, "steps": 1, "groups_per_step": 1, "seed": 0}
    for groups in ([], [RankedGroup(sequences=[[1, 2]], pairs=[])]):
        with pytest.raises(ValueError, match="at least one"):
            train_ranked(make_model(), groups, **settings)


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = make_model()
    with torch.no_grad():
        model.score.weight.fill_(math.inf)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match="step 1"):
        train_ranked(model, make_groups(2, 3), pad_id=PAD, learning_rate=1e-3, steps=1, groups_per_step=2, seed=0)
    assert torch.equal(parameters(model), before)


def train_on_rank(rank: int, folder: Path) -> dict:
    """One of two ranks; its seed is its rank, since rank 0's parameters must be the ones that count."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        model = make_model(seed=rank)
        metrics = train_ranked(
            model, make_groups(8, 4), pad_id=PAD, learning_rate=1e-3, steps=3, groups_per_step=3, seed=3
        )
        accuracy = pair_accuracy(model, make_groups(5, 4, seed=1), pad_id=PAD)
    finally:
        dist.destroy_process_group()
    return {"parameters": parameters(model), "loss": metrics["loss"], "accuracy": accuracy}


def second_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(train_on_rank(1, folder), folder / "1.pt")


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Three groups a step over two ranks: shares of unlike size, so averaging over ranks would show."""
    other = mp.get_context("spawn").Process(target=second_rank, args=(tmp_path,))
    other.start()
    first = train_on_rank(0, tmp_path)
    other.join()
    second = torch.load(tmp_path / "1.pt")
    assert torch.equal(first["parameters"], second["parameters"])
    model = make_model(seed=0)
    metrics = train_ranked(model, make_groups(8, 4), pad_id=PAD, learning_rate=1e-3, steps=3, groups_per_step=3, seed=3)
    assert torch.allclose(first["parameters"], parameters(model), atol=2e-5)
    for result in (first, second):
        assert result["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert result["accuracy"] == pair_accuracy(model, make_groups(5, 4, seed=1), pad_id=PAD)
