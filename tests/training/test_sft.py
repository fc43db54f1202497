"""SFT learns the answers and nothing else, and leaves a folder that transformers loads as it is."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from r3hf_ray.config import SFTConfig
from r3hf_ray.data.loading import load_examples
from r3hf_ray.models.folder import ModelFolder, load_tokenizer
from r3hf_ray.sections.data import DataSection
from r3hf_ray.training.sft import train_policy
from r3hf_ray.types import Example

EXAMPLES = [Example(prompt_ids=[1, 5 + i, 20], answer_ids=[30 + i, *[31, 40 - i][: 1 + i % 2], 2]) for i in range(8)]


def config(base: Path, **sft: object) -> SFTConfig:
    return SFTConfig(
        run={"name": "x"},
        model={"base": str(base)},
        data={"source": "x"},
        sft={"batch_size": 8, "microbatch_size": 4, "learning_rate": 1e-2, **sft},
    )


@torch.no_grad()
def answer_loss(model: torch.nn.Module, examples: list[Example]) -> float:
    """Mean over all answer tokens, one row at a time."""
    losses = []
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-logprobs.gather(1, ids[0, 1:, None])[len(example.prompt_ids) - 1 :, 0])
    return torch.cat(losses).mean().item()


def test_answers_are_learnt_and_nothing_else(base_model: Path, tmp_path: Path) -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    before = answer_loss(AutoModelForCausalLM.from_pretrained(base_model), EXAMPLES)
    train_policy(
        config(base_model, epochs=20),
        EXAMPLES,
        EXAMPLES[:2],
        folder=tmp_path / "model",
        on_metrics=lambda step, metrics: rows.append((step, metrics)),
    )
    steps = [(step, metrics) for step, metrics in rows if "sft/loss" in metrics]
    assert [step for step, _ in steps] == list(range(1, 21))
    assert steps[0][1]["sft/loss"] == pytest.approx(before, rel=1e-5)
    assert steps[-1][1]["sft/tokens"] == 20 * sum(len(e.prompt_ids + e.answer_ids) for e in EXAMPLES)

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert answer_loss(trained, EXAMPLES) < 0.3 * before
    assert rows[-1][1]["sft/eval/loss"] == pytest.approx(answer_loss(trained, EXAMPLES[:2]), rel=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.pad_token_id == trained.config.pad_token_id != tokenizer.eos_token_id
    assert not (tmp_path / "model.partial").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_saved_policy_stops_where_its_template_closes_a_turn(cases: Path, tmp_path: Path) -> None:
    """Its tokenizer's EOS is another token; whoever samples from the folder must know both."""
    base = cases / "policy_eos_is_not_template_end"
    data = DataSection(source=str(cases.parent / "rows.jsonl"))
    Path(data.source).write_text('{"prompt": "Hi", "completion": "Yes"}\n' * 8)
    examples = load_examples(data, load_tokenizer(base), max_tokens=64).train
    assert {example.answer_ids[-1] for example in examples} == {258}
    train_policy(config(base), examples, [], folder=tmp_path / "model", on_metrics=lambda step, metrics: None)
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [256, 258]
    assert ModelFolder(tmp_path / "model", "policy").end_ids == [256, 258]
