"""A reward model learns preferences, and scores in plain transformers what it scored in training."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from r3hf_ray.config import RewardConfig
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.models.load import load_reward_model, score_head, untrained_reward_model
from r3hf_ray.training import reward_model
from r3hf_ray.training.ranking import cut_fraction, cut_length, pair_accuracy, scores_of_prefixes
from r3hf_ray.training.reward_model import train_on_groups, train_on_pairs
from r3hf_ray.types import Pair, RankedGroup

PAIRS = [Pair(prompt_ids=[1, 5 + i, 20], chosen_ids=[30, 33 + i % 4, 2], rejected_ids=[31, 2]) for i in range(12)]
ORDER = [(0, 1), (0, 2), (1, 2)]
GROUPS = [
    RankedGroup(prompt_tokens=3, sequences=[[1, 5 + i, 20, 30 + j, 2] for j in range(3)], pairs=ORDER) for i in range(8)
]
OPTIONS = pytest.mark.parametrize(
    ("head", "prefix_weight"), [("last_token", 0.0), ("last_token", 0.5), ("running_sum", 0.0), ("running_sum", 0.5)]
)
Rows = list[tuple[int, dict[str, float]]]


def config(base: Path, **training: object) -> RewardConfig:
    section = {"batch_size": 4, "microbatch_size": 2, "learning_rate": 5e-3, "epochs": 8, **training}
    return RewardConfig(run={"name": "x"}, model={"base": str(base)}, data={"source": "x"}, reward_training=section)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Scores of all sequences of `PAIRS` and `GROUPS` by the model as it is in memory when it is saved."""
    scores: list[torch.Tensor] = []
    save = reward_model.save_model

    def scored_and_saved(model, tokenizer, folder) -> None:
        with torch.no_grad():
            scores.append(scores_of_prefixes(model.eval(), SEQUENCES, WHOLE, pad_id=tokenizer.pad_token_id))
        save(model, tokenizer, folder)

    monkeypatch.setattr(reward_model, "save_model", scored_and_saved)
    return scores


SEQUENCES = [list(ids) for group in [*(pair.as_group() for pair in PAIRS), *GROUPS] for ids in group.sequences]
WHOLE = [(row, len(ids)) for row, ids in enumerate(SEQUENCES)]


def plain_scores(folder: Path, sequences: list[list[int]]) -> torch.Tensor:
    """As a stranger would score: the saved tokenizer pads, the saved config pools."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def check_folder(folder: Path, groups: list[RankedGroup], trained: list[torch.Tensor]) -> None:
    model = load_reward_model(folder, torch.float32)
    ids = model.config.get_text_config()
    with torch.no_grad():
        assert torch.equal(scores_of_prefixes(model, SEQUENCES, WHOLE, pad_id=ids.pad_token_id), trained[0])
    torch.testing.assert_close(plain_scores(folder, SEQUENCES), trained[0], rtol=1e-5, atol=1e-6)
    assert ids.pad_token_id != ids.eos_token_id
    assert pair_accuracy(model, groups, pad_id=ids.pad_token_id) > 0.95


@OPTIONS
def test_pairs_are_learnt_and_scored_the_same_in_plain_transformers(
    base_model: Path, tmp_path: Path, trained: list[torch.Tensor], head: str, prefix_weight: float
) -> None:
    rows: Rows = []
    train_on_pairs(
        config(base_model, head=head, prefix_weight=prefix_weight),
        PAIRS[:10],
        PAIRS[10:],
        folder=tmp_path / "model",
        on_metrics=lambda step, metrics: rows.append((step, metrics)),
    )
    steps = [(step, metrics) for step, metrics in rows if "reward_model/loss" in metrics]
    assert [step for step, _ in steps] == list(range(1, 25))
    assert steps[0][1]["reward_model/loss"] == pytest.approx((1 + prefix_weight) * math.log(2), abs=0.2)
    assert steps[-1][1]["reward_model/tokens"] == 8 * 10 * (6 + 5)
    assert ("reward_model/prefix_accuracy" in steps[0][1]) == (prefix_weight > 0)
    if prefix_weight:
        assert steps[-1][1]["reward_model/prefix_loss"] < 0.3 and steps[-1][1]["reward_model/prefix_accuracy"] == 1.0
    last = rows[-1][1]
    assert (last["eval/heldout/pair_accuracy"], last["eval/heldout/pair_pairs"]) == (1.0, 2.0)
    assert last["eval/heldout/pair_accuracy_low"] == pytest.approx(0.342, abs=1e-3)
    check_folder(tmp_path / "model", [p.as_group() for p in PAIRS], trained)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@OPTIONS
def test_ranked_groups_end_in_the_same_kind_of_folder(
    base_model: Path, tmp_path: Path, trained: list[torch.Tensor], head: str, prefix_weight: float
) -> None:
    rows: Rows = []
    train_on_groups(
        config(base_model, groups_per_step=4, epochs=10, head=head, prefix_weight=prefix_weight),
        GROUPS[:6],
        GROUPS[6:],
        folder=tmp_path / "model",
        on_metrics=lambda step, metrics: rows.append((step, metrics)),
    )
    assert [step for step, _ in rows] == [*range(1, 16), 15]
    names = {"loss", "accuracy", "grad_norm"} | ({"prefix_loss", "prefix_accuracy"} if prefix_weight else set())
    assert set(rows[0][1]) == {f"reward_model/{name}" for name in names}
    assert rows[-1][1]["eval/heldout/pair_pairs"] == 6.0
    check_folder(tmp_path / "model", GROUPS, trained)


def test_a_model_that_cannot_be_measured_is_kept(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> float:
        raise RuntimeError("no backend for this tensor")

    monkeypatch.setattr(reward_model, "pair_accuracy", broken)
    settings = config(base_model, groups_per_step=4, steps=1)
    with pytest.raises(RuntimeError, match="no backend"):
        train_on_groups(settings, GROUPS, GROUPS, folder=tmp_path / "model", on_metrics=lambda step, metrics: None)
    load_reward_model(tmp_path / "model", torch.float32)


def test_ranked_groups_are_trained_in_the_configured_dtype(base_model: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        rows: Rows = []
        settings = config(base_model, groups_per_step=4, steps=2)
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": dtype})})
        train_on_groups(
            settings,
            GROUPS,
            [],
            folder=tmp_path / dtype,
            on_metrics=lambda step, metrics, rows=rows: rows.append((step, metrics)),
        )
        losses[dtype] = rows[-1][1]["reward_model/loss"]
        weights = load_reward_model(tmp_path / dtype, torch.float32).state_dict()
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


@pytest.fixture(scope="module")
def random_heads(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reward models that training goes on from, so that the first losses are not log 2."""
    folders = {}
    for head in ("last_token", "running_sum"):
        model, base = untrained_reward_model(base_model, head=head), ModelFolder(base_model, "base model")
        base.settle_tokens(model)
        torch.manual_seed(3)
        torch.nn.init.normal_(score_head(model).weight, std=0.1)
        folders[head] = tmp_path_factory.mktemp(head) / "base"
        model.save_pretrained(folders[head])
        base.tokenizer.save_pretrained(folders[head])
    return folders


def first_losses(folder: Path, pairs: list[Pair], *, center_coef: float) -> tuple[float, float]:
    """Loss of the pairs with centring, and of the pairs as step 0 cuts them: each sequence in its own forward."""
    model = load_reward_model(folder, torch.float32)

    def score(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0, 0]

    whole, cut = [], []
    for row, pair in enumerate(pairs):
        both = list(pair.as_group().sequences)
        chosen, rejected = map(score, both)
        whole.append(-logsigmoid(chosen - rejected) + center_coef * (chosen + rejected) ** 2)
        lengths = [cut_length(3, len(ids), cut_fraction(0, 0, row)) for ids in both]
        chosen, rejected = (score(ids[:length]) for ids, length in zip(both, lengths, strict=True))
        cut.append(-logsigmoid(chosen - rejected))
    return torch.stack(whole).mean().item(), torch.stack(cut).mean().item()


LONG = [
    Pair(prompt_ids=[1, 5 + i, 20], chosen_ids=[*range(21, 29 - i % 3), 2], rejected_ids=[*range(31, 40 - i), 2])
    for i in range(8)
]


@torch.no_grad()
@pytest.mark.parametrize("head", ["last_token", "running_sum"])
def test_trl_first_step_is_the_loss_of_pairs_forwarded_alone(
    random_heads: dict[str, Path], tmp_path: Path, head: str
) -> None:
    """All pairs in one optimizer step of two microbatches."""
    rows: Rows = []
    training = {"batch_size": 8, "microbatch_size": 4, "epochs": 1, "center_coef": 0.01}
    with torch.enable_grad():
        train_on_pairs(
            config(random_heads[head], head=head, prefix_weight=0.5, **training),
            LONG,
            [],
            folder=tmp_path / "model",
            on_metrics=lambda step, metrics: rows.append((step, metrics)),
        )
    whole, cut = first_losses(random_heads[head], LONG, center_coef=0.01)
    ((step, metrics),) = rows
    assert step == 1 and abs(cut - math.log(2)) > 0.005 and abs(cut - whole) > 0.005
    assert metrics["reward_model/prefix_loss"] == pytest.approx(cut, rel=1e-5)
    assert metrics["reward_model/loss"] == pytest.approx(whole + 0.5 * cut, rel=1e-5)


def learn(base: Path, folder: Path, *, ranks: int) -> dict[str, float]:
    """Metrics of the last step."""
    rows: list[dict[str, float]] = []
    training = {"batch_size": 4, "microbatch_size": 2, "epochs": 2, "prefix_weight": 0.5, "head": "running_sum"}
    settings = config(base, **training)
    settings = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"ranks": ranks})})
    train_on_pairs(settings, LONG, [], folder=folder, on_metrics=lambda _, metrics: rows.append(metrics))
    return rows[-1] if rows else {}


def learn_on_rank(rank: int, base: Path, folder: Path) -> dict[str, float]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    return learn(base, folder, ranks=2)


@pytest.mark.slow
def test_two_ranks_of_trl_learn_what_one_process_learns(random_heads, tmp_path, run_ranks) -> None:
    """Shares are equal, so averaged gradients are those of the whole; a pair is cut by its row, not by its rank."""
    folders = [tmp_path / "one", tmp_path / "two"]
    alone = learn(random_heads["running_sum"], folders[0], ranks=1)
    assert run_ranks(learn_on_rank, random_heads["running_sum"], folders[1])[0] == pytest.approx(alone, rel=1e-3)
    sequences = [list(ids) for pair in LONG for ids in pair.as_group().sequences]
    one, two = (plain_scores(folder, sequences) for folder in folders)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
