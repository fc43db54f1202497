"""What only a GPU can show; skipped with a reason where there is none."""

from pathlib import Path

import pytest
import torch

from r3hf_ray.cli import main
from r3hf_ray.instruments.toy.settings import ToySection
from r3hf_ray.instruments.toy.world import make_world
from r3hf_ray.records.metrics import read_metrics

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU; this machine has none"),
]

JOB = """
[run]
name = "gpu"
folder = "{folder}"
[model]
policy = "{folder}/world/base"
reward_model = "{folder}/rm"
[data]
source = "{folder}/world/prompts.jsonl"
heldout = 16
split_by = "row"
[rollout]
gpus_per_actor = {sampler_gpus}
gpu_memory_utilization = 0.3
dtype = "bfloat16"
[reward]
actors = 1
gpus_per_actor = {share}
calibration_samples = 16
[ppo]
steps = 3
[learner]
ranks = 1
gpus_per_rank = {learner_gpus}
dtype = "bfloat16"
[weights]
backend = "{backend}"
[evaluation]
prompts = 16
[tracking]
wandb = "disabled"
"""


def run_on_gpu(folder: Path, *, backend: str, sampler_gpus: float, learner_gpus: float) -> list[dict[str, float]]:
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    make_world(folder / "world", ToySection(sft_rows=8, train_prompts=64, heldout_prompts=16))
    config = AutoConfig.from_pretrained(folder / "world/base")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    AutoTokenizer.from_pretrained(folder / "world/base").save_pretrained(folder / "rm")
    share = 0.2 if sampler_gpus < 1 else min(1.0, GPUS - sampler_gpus - learner_gpus)
    text = JOB.format(folder=folder, backend=backend, sampler_gpus=sampler_gpus, learner_gpus=learner_gpus, share=share)
    (folder / "job.toml").write_text(text)
    assert main(["ppo", str(folder / "job.toml")]) == 0
    return read_metrics(folder / "gpu")


def test_whole_run_on_one_gpu_with_object_refs(tmp_path: Path) -> None:
    rows = run_on_gpu(tmp_path, backend="object_ref", sampler_gpus=0.4, learner_gpus=0.4)
    assert rows[-1]["sync/version"] == 3
    assert rows[-1]["sync/probe_gap"] < 0.05


@pytest.mark.skipif(GPUS < 2, reason="NCCL weight transfer needs a GPU for the learner and one for the sampler")
def test_weights_travel_by_nccl(tmp_path: Path) -> None:
    rows = run_on_gpu(tmp_path, backend="nccl", sampler_gpus=1, learner_gpus=1)
    assert rows[-1]["sync/version"] == 3
    assert rows[-1]["sync/probe_gap"] < 0.05
