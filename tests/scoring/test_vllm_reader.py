"""A real vLLM pooling engine against transformers, in this process; what vLLM changes here is put back behind it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForSequenceClassification

from r3hf_ray.actors.environment import VLLM_ON_CPU
from r3hf_ray.actors.reward import RewardActor
from r3hf_ray.errors import ModelError
from r3hf_ray.models.running_sum import RunningSumConfig
from r3hf_ray.scoring import vllm_reader as vllm_scores
from r3hf_ray.scoring.readers import ReaderSettings, Reading, SameIds, Sampled
from r3hf_ray.scoring.scorer import RewardModel, ScoringSettings
from r3hf_ray.scoring.vllm_reader import (
    BOUNDS,
    CACHE_BYTES,
    SPARE_TOKENS,
    VllmReader,
    cache_bytes,
    probe,
    require_equal,
    require_readable,
    require_room,
)
from r3hf_ray.sections.models import ModelSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.types import MAIN, Finish, ScoredTrajectory, Trajectory

pytestmark = pytest.mark.slow

WINDOW = 512
STEP = 4096
"""Tokens vLLM schedules at once on a CPU; a row on its border is read in two pieces. [tokens]"""
LENGTHS = [2, 3, 31, 127, 128, 129, 256, 257, 300, WINDOW - 2]
"""Around one and two blocks of the cache, 128 tokens each, up to the window with two tokens of suffix."""
BOUND = BOUNDS[torch.float32]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ReaderSettings:
    """Of a random reward model; vLLM's attention on a CPU knows heads of 32, and not those of `tiny_models`."""
    folder = tmp_path_factory.mktemp("reward")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, **ids, max_position_embeddings=WINDOW, initializer_range=0.15, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return ReaderSettings(source=str(folder), suffix_ids=(7, 9), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def vllm_in_process() -> Iterator[None]:
    """The environment that vLLM reads, the function it replaces and the group it opens are as before, afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VLLM_ON_CPU.items():
            patch.setenv(name, value)
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        yield
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def reader(vllm_in_process: None, settings: ReaderSettings) -> VllmReader:
    return VllmReader(settings)


def sampled(lengths: list[int], *, seed: int = 0) -> Sampled:
    generator = np.random.default_rng(seed)
    return Sampled.of(
        [generator.integers(3, 97, size=length).astype(np.int32) for length in lengths],
        [1 + length // 3 for length in lengths],
        [number % 2 == 1 for number in range(len(lengths))],
        device=torch.device("cpu"),
    )


def numbers(reading: Reading) -> dict[str, torch.Tensor]:
    return {"prefix": reading.scores.prefix, "prompt": reading.scores.prompt, "pooled": reading.scores.pooled}


def assert_equal(found: Reading, expected: Reading, batch: Sampled) -> None:
    spread = float(expected.scores.prefix[batch.response_mask].std())
    for name, theirs in numbers(expected).items():
        torch.testing.assert_close(numbers(found)[name], theirs, rtol=0, atol=BOUND * spread)
    assert not found.scores.prefix[~batch.response_mask].any()
    assert not found.refused
    assert not found.alignment_loss.any()


@pytest.mark.parametrize("lengths", [LENGTHS, [WINDOW - 2] * (STEP // WINDOW + 2), [40]], ids=["blocks", "pieces", "1"])
def test_scores_are_those_of_transformers(reader: VllmReader, settings: ReaderSettings, lengths: list[int]) -> None:
    batch = sampled(lengths)
    found = reader.read(batch)
    assert_equal(found, SameIds(settings).read(batch), batch)
    suffixed = batch.finished
    lasts = found.scores.prefix.gather(1, (batch.attention_mask.sum(1) - 1)[:, None])[:, 0]
    assert (found.scores.pooled[suffixed] != lasts[suffixed]).all(), "a finished row is pooled behind its suffix"
    assert torch.equal(found.scores.pooled[~suffixed], lasts[~suffixed])


def test_no_row_knows_of_another_or_of_an_earlier_call(reader: VllmReader) -> None:
    batch = sampled(LENGTHS)
    first, again = reader.read(batch), reader.read(batch)
    for name, values in numbers(first).items():
        assert torch.equal(numbers(again)[name], values)
    alone = reader.read(
        Sampled(
            token_ids=batch.token_ids[6:7, :256],
            attention_mask=batch.attention_mask[6:7, :256],
            response_mask=batch.response_mask[6:7, :256],
            finished=batch.finished[6:7],
        )
    )
    torch.testing.assert_close(alone.scores.prefix[0], first.scores.prefix[6, :256], rtol=0, atol=1e-5)


def test_a_row_longer_than_the_cache_is_refused_and_the_others_are_read(
    reader: VllmReader, settings: ReaderSettings
) -> None:
    """The second row is finished, so its suffix is what no longer fits."""
    batch = sampled([20, WINDOW - 1, WINDOW + 1, 30])
    found = reader.read(batch)
    assert sorted(found.refused) == [1, 2]
    assert f"has {WINDOW + 1} tokens" in found.refused[1]
    kept = torch.tensor([0, 3])
    expected = SameIds(settings).read(batch)
    for name, theirs in numbers(expected).items():
        torch.testing.assert_close(numbers(found)[name][kept], theirs[kept], rtol=0, atol=1e-5)
    assert list(reader.read(sampled([WINDOW + 1])).refused) == [0]


def test_a_cache_of_just_the_longest_row_reads_it_and_a_smaller_one_is_refused(
    vllm_in_process: None, settings: ReaderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the engine itself: a row that it does not read would be left out of training, and it would be a long one."""
    known = replace(settings, longest=WINDOW)
    monkeypatch.setattr(vllm_scores, "CACHE_BYTES", 0)
    assert not VllmReader(known).read(sampled([WINDOW])).refused
    small = cache_bytes(replace(settings, longest=0))
    monkeypatch.setattr(vllm_scores, "cache_bytes", lambda own: small)
    with pytest.raises(ModelError, match=f"rows of up to (128|256) tokens, and one of {WINDOW} can come: lower"):
        VllmReader(known)


def test_the_cache_grows_with_the_longest_row(
    settings: ReaderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_bytes(settings) == CACHE_BYTES
    token = 2 * 2 * 2 * 32 * 4  # keys and values x layers x heads x width x bytes of a float32
    rows = 4 * 10**6
    assert cache_bytes(replace(settings, longest=rows)) == (rows + SPARE_TOKENS) * token
    half = replace(settings, longest=rows, dtype=torch.bfloat16)
    assert cache_bytes(half) == (rows + SPARE_TOKENS) * token // 2
    GPT2Config(n_layer=3, n_head=2, n_embd=64).save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_scores, "CACHE_BYTES", 0)
    assert cache_bytes(replace(settings, source=str(tmp_path), longest=10)) == (10 + SPARE_TOKENS) * 2 * 3 * 64 * 4


def test_an_engine_without_room_for_the_longest_row_is_refused(settings: ReaderSettings) -> None:
    require_room(20, settings)
    require_room(20, replace(settings, longest=20))
    with pytest.raises(ModelError, match=r"reward\.backend = vllm .* 20 tokens, and one of 21 can come: lower rollout"):
        require_room(20, replace(settings, longest=21))


def test_a_model_that_vllm_reads_otherwise_is_refused(
    vllm_in_process: None, settings: ReaderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers is given a head that differs by a thousandth; vLLM reads the folder as it is."""
    model = LlamaForSequenceClassification.from_pretrained(settings.source)
    with torch.no_grad():
        model.score.weight *= 1.001
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_scores, "SameIds", lambda own: SameIds(replace(own, source=str(tmp_path))))
    with pytest.raises(ModelError, match=r"differ by up to .* in float32: use reward\.backend = transformers"):
        VllmReader(settings)


def test_a_model_that_vllm_cannot_run_is_refused_in_one_sentence(
    vllm_in_process: None, settings: ReaderSettings, tiny_models: Any
) -> None:
    with pytest.raises(ModelError, match=r"vLLM cannot run it \(.*head_dim=8.*use reward\.backend") as error:
        VllmReader(replace(settings, source=str(tiny_models.reward)))
    assert "\n" not in str(error.value)


def test_what_the_proof_finds(settings: ReaderSettings) -> None:
    """An activation, a score one token late, a bfloat16 head, and numbers that are none; in bfloat16 the first two."""
    batch = probe(settings)
    expected = SameIds(settings).read(batch)
    scores = expected.scores
    rounded = scores.prefix.bfloat16().float()
    wrong = {
        "sigmoid": replace(scores, prefix=scores.prefix.sigmoid().masked_fill(~batch.response_mask, 0.0)),
        "late": replace(scores, prefix=scores.prefix.roll(1, 1).masked_fill(~batch.response_mask, 0.0)),
        "prompt": replace(scores, prompt=scores.pooled),
        "rounded": replace(scores, prefix=rounded),
        "nan": replace(scores, pooled=scores.pooled * torch.nan),
    }
    for name, mistaken in wrong.items():
        with pytest.raises(ModelError, match="differ by up to"):
            require_equal(replace(expected, scores=mistaken), scores, batch.response_mask, settings)
        coarse = replace(settings, dtype=torch.bfloat16)
        if name != "rounded":
            with pytest.raises(ModelError, match="differ by up to"):
                require_equal(replace(expected, scores=mistaken), scores, batch.response_mask, coarse)
    with pytest.raises(ModelError, match="vLLM says that it is too long"):
        require_equal(replace(expected, refused={1: "it is too long"}), scores, batch.response_mask, settings)
    require_equal(expected, scores, batch.response_mask, settings)


def test_the_probe_fits_window_and_vocabulary(settings: ReaderSettings, tiny_models: Any) -> None:
    batch = probe(settings)
    assert batch.attention_mask.sum(1).tolist() == [2, 17, 130, 300]
    assert batch.response_mask.any(1).all()
    assert batch.finished.tolist() == [True, False, True, False]
    small = probe(replace(settings, source=str(tiny_models.reward)))
    assert small.attention_mask.sum(1).tolist() == [2, 17, 62, 62]
    assert int(small.token_ids.max()) < 40
    assert torch.equal(probe(settings).token_ids, batch.token_ids)


def test_attention_and_running_sums_are_refused_before_anything_is_loaded(
    settings: ReaderSettings, tmp_path: Path
) -> None:
    require_readable(settings.source, attention=False)
    with pytest.raises(ModelError, match=r"no attention, which reward\.mode pays by"):
        require_readable(settings.source, attention=True)
    RunningSumConfig(text_config=LlamaConfig()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="running-sum head"):
        require_readable(str(tmp_path), attention=False)


def test_a_reward_actor_gives_the_same_on_either_backend(
    vllm_in_process: None, settings: ReaderSettings, tiny_models: Any
) -> None:
    """Token rewards within the bound; the reference, which transformers runs beside vLLM, to the bit."""
    scoring = ScoringSettings(
        reward=RewardSection(),
        model=ModelSection(policy=str(tiny_models.policy), reward_model=settings.source),
        temperature=1.0,
        reads={MAIN: RewardModel(suffix_ids=(7,))},
    )
    made = [trajectory(1, [8, 9, 10, 2]), trajectory(2, list(range(3, 30)))]
    keys = [(1, 0), (2, 0)]
    *theirs, _ = RewardActor(scoring).score(made, keys)
    *ours, report = RewardActor(replace(scoring, reward=RewardSection(backend="vllm"))).score(made, keys)
    assert report.failures == []
    for our, their in zip(ours, theirs, strict=True):
        assert isinstance(our, ScoredTrajectory)
        np.testing.assert_allclose(our.main.token_rewards, their.main.token_rewards, rtol=0, atol=2e-5)
        np.testing.assert_allclose(our.main.prefix_scores, their.main.prefix_scores, rtol=0, atol=2e-5)
        assert abs(our.main.score - their.main.score) < 2e-5
        np.testing.assert_array_equal(our.ref_logprobs, their.ref_logprobs)


def trajectory(prompt_id: int, response: list[int]) -> Trajectory:
    ids = [5, 6, 7, *response]
    return Trajectory(
        prompt_id=prompt_id,
        sample=0,
        attempt=1,
        policy_version=4,
        prompt_len=3,
        finish=Finish.EOS if response[-1] == 2 else Finish.LENGTH,
        token_ids=np.asarray(ids, np.int32),
        behavior_logprobs=np.zeros(len(ids), np.float32),
    )
