"""The table of media: what a run may choose, and that learners and samplers load no library they do not need."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r3hf_ray.errors import ConfigError
from r3hf_ray.sections.actors import WeightsSection
from r3hf_ray.weights.contract import LearnerEnd, Loaded, objection
from r3hf_ray.weights.in_process import publication
from r3hf_ray.weights.media import MEDIA, check_medium, make_sender, medium_of

PACKAGE = Path(__file__).parents[2] / "r3hf_ray"


def end(backend: str) -> LearnerEnd:
    return LearnerEnd(
        rank=0, section=WeightsSection(backend=backend), dtype="float32", samplers=1, coordinator=None, store=None
    )


def test_auto_is_what_has_been_proven() -> None:
    check_medium("auto", learner_gpus=1.0, sampler_gpus=1.0, probe_tokens=0)
    assert medium_of("auto") == "object_ref"
    assert medium_of("nccl") == "nccl"


@pytest.mark.parametrize(
    ("backend", "gpus", "probe_tokens", "words"),
    [
        ("ncll", 0.0, 32, ["weights.backend: no medium 'ncll'", "auto, object_ref, nccl"]),
        ("in_process", 0.0, 32, ["weights.backend: no medium 'in_process'"]),
        ("nccl", 0.0, 32, ["learner.gpus_per_rank", "rollout.gpus_per_actor"]),
        ("nccl", 0.5, 32, ["needs whole GPUs"]),
        ("nccl", 1.0, 0, ["weights.probe_tokens = 0", "only proof"]),
    ],
)
def test_a_medium_that_cannot_be_is_refused(backend: str, gpus: float, probe_tokens: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_medium(backend, learner_gpus=gpus, sampler_gpus=gpus, probe_tokens=probe_tokens)
    assert all(word in str(caught.value) for word in words)


def test_a_learner_that_publishes_refs_does_not_load_vllm() -> None:
    program = """
import sys
from r3hf_ray.actors import learner
from r3hf_ray.sections.actors import WeightsSection
from r3hf_ray.weights.contract import LearnerEnd
from r3hf_ray.weights.media import make_sender
section = WeightsSection()
make_sender(LearnerEnd(rank=0, section=section, dtype="float32", samplers=1, coordinator=None, store=None))
sys.stdout.write(str("vllm" in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False", done.stderr


def test_a_medium_within_the_process_sends_nothing_to_another() -> None:
    with pytest.raises(ConfigError, match="does not leave the learner's process"):
        make_sender(end("in_process"))


def test_weights_in_one_process_are_shared_and_provable() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    made = publication(lambda: iter([("w", weight)]), 4)
    fetch = MEDIA["in_process"].fetch
    assert fetch is not None
    (tensor,) = fetch(made.parts[0])
    assert (tensor.name, tensor.dtype) == ("w", "float32")
    assert tensor.array.ctypes.data == weight.data_ptr()
    answer = Loaded(version=4, fingerprint=made.fingerprint, probe_gap=0.0, seconds=0.0)
    assert objection(made, answer, max_gap=0.0) == ""


def test_two_files_know_vllms_interface() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    knowing = {name for name, text in sources.items() if "vllm.distributed.weight_transfer" in text}
    assert knowing == {"weights/engine.py", "weights/nccl.py"}
