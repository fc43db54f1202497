"""Real vLLM, tied and untied: what is sampled, and the proof that published weights are the ones that sample.

One actor process holds both engines, since importing vLLM is most of the cost. Transformers is the judge.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from transformers import LlamaConfig, LlamaForCausalLM

from r3hf_ray.actors.sampler import Sampler, StaleWeightsError, engine_environment
from r3hf_ray.draws import seed_of
from r3hf_ray.models.logprobs import token_logprobs
from r3hf_ray.models.sharding import full_parameters
from r3hf_ray.sections.actors import EngineFacts, RolloutSection
from r3hf_ray.types import Finish, GroupReport, Request, SampleGroup, Trajectory
from r3hf_ray.weights.contract import Loaded, Probe, Publication
from r3hf_ray.weights.object_ref import WeightStore, publish
from r3hf_ray.weights.tensors import in_transit

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KINDS = ("untied", "tied")
PADDED = "padded"
UNKNOWN = tuple(range(57, 64))
"""Ids of the padded kind that are no token: its head likes them best."""
BLOCK = 128  # tokens of a cache block on CPU
EOS = 2
LIMIT = 12
TEMPERATURE = 0.7
SECTION = RolloutSection(max_response_tokens=LIMIT, temperature=TEMPERATURE)
PROBE = np.random.default_rng(1).integers(3, UNKNOWN[0], BLOCK + 32).tolist()


class Samplers:
    """Both engines in one process, and the sabotage that tests need there."""

    def __init__(self, facts: dict[str, EngineFacts]) -> None:
        torch.set_num_threads(1)
        self.of = {kind: Sampler(SECTION, each) for kind, each in facts.items()}

    def load(self, kind: str, publication: Publication) -> Loaded:
        return self.of[kind].load_weights(publication)

    def generate(self, kind: str, requests: list[Request]) -> tuple[list[Trajectory], GroupReport]:
        return self.of[kind].generate(requests)

    def cached_tokens(self, kind: str, requests: list[Request]) -> list[int]:
        return [output.num_cached_tokens for output in self.sampled(kind, requests)]

    def sampled(self, kind: str, requests: list[Request]) -> list[Any]:
        """vLLM's own outputs."""
        self.of[kind]._enqueue(requests)
        return self.of[kind]._llm.wait_for_completion(use_tqdm=False)

    def together(self, kind: str, groups: list[list[Request]]) -> list[tuple[list[Trajectory], GroupReport]]:
        """Groups that are in the engine at the same time, each one step later than the one before."""
        sampler, made = self.of[kind], []
        for number, group in enumerate(groups):
            sampler.add(SampleGroup(number=number, requests=group))
            made += sampler.step()
        while not sampler.idle:
            made += sampler.step()
        return made

    def unreadable(self, kind: str, groups: list[list[Request]]) -> tuple[list[int], list[int], bool]:
        """Numbers of the groups that come out, and that are dropped, where the answer to the last cannot be read."""
        sampler = self.of[kind]
        read, bad = sampler._trajectory, groups[-1][0].key
        for number, group in enumerate(groups):
            sampler.add(SampleGroup(number=number, requests=group))

        def once(request: Request, output: Any) -> Any:
            if request.key == bad:
                raise ValueError("a logprob is missing")
            return read(request, output)

        sampler._trajectory = once
        made = []
        try:
            while True:
                made += [report.number for _, report in sampler.step()]
        except ValueError:
            dropped = [report.number for _, report in sampler.drop("a logprob is missing")]
        finally:
            sampler._trajectory = read
        return made, dropped, sampler.idle

    def aborted(self, kind: str, first: list[Request], second: list[Request]) -> tuple[list[int], int]:
        """Numbers of the groups that come out when the first is aborted after a step, and what the engine still has."""
        sampler = self.of[kind]
        sampler.add(SampleGroup(number=1, requests=first))
        sampler.step()
        sampler.add(SampleGroup(number=2, requests=second))
        found = [sampler.abort(1), sampler.abort(1)]
        assert found == [True, False]
        numbers = []
        while not sampler.idle:
            numbers += [report.number for _, report in sampler.step()]
        return numbers, len(sampler._llm.llm_engine.output_processor.request_states)

    def interrupted(self, kind: str, requests: list[Request]) -> int:
        """A call that fails after the engine's first step; how many requests are still in the engine then."""
        engine = self.of[kind]._llm.llm_engine
        step = engine.step

        def once() -> None:
            step()
            raise RuntimeError("lost")

        engine.step = once
        try:
            with pytest.raises(RuntimeError, match="lost"):
                self.of[kind].generate(requests)
        finally:
            engine.step = step
        return len(engine.output_processor.request_states)

    def load_without_repacking(self, kind: str, publication: Publication) -> Loaded:
        from r3hf_ray.weights import engine as weights

        repacking = weights.FetchEngine.finish_weight_update

        def finalize_only(engine: Any) -> None:
            weights.finalize_layerwise_reload(engine.model, engine.model_config)

        weights.FetchEngine.finish_weight_update = finalize_only
        try:
            return self.load(kind, publication)
        finally:
            weights.FetchEngine.finish_weight_update = repacking

    def load_without_cache_reset(self, kind: str, publication: Publication) -> Loaded:
        self.of[kind]._llm.reset_prefix_cache = lambda: False
        try:
            return self.load(kind, publication)
        finally:
            del self.of[kind]._llm.reset_prefix_cache

    def as_torch(self, bucket: list[Any]) -> list[tuple[str, list[int], bytes]]:
        """Each tensor as an engine gets it: data type, shape, bytes."""
        from r3hf_ray.weights.tensors import as_torch

        tensors = map(as_torch, bucket)
        return [(str(x.dtype), list(x.shape), bits(x)) for x in tensors]


@dataclass
class World:
    """The engines, the store, and transformers models whose weights the tests change and publish."""

    samplers: Any
    store: Any
    models: dict[str, LlamaForCausalLM]
    version: int = 0

    def publish(self, kind: str, *, noise_seed: int | None = None) -> Publication:
        """Publish the model's weights, after noise where a seed is given, with an honest probe."""
        model = self.models[kind]
        if noise_seed is not None:
            generator = torch.Generator().manual_seed(noise_seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.version += 1
        probe = Probe(token_ids=PROBE, logprobs=logprobs(model, PROBE, 1, temperature=1.0)[1:].tolist())
        tensors = in_transit(full_parameters(model), "float32")
        return publish(self.store, self.version, tensors, probe=probe, max_bytes=30_000)

    def sync(self, kind: str, *, noise_seed: int | None = None) -> Loaded:
        return self.call("load", kind, self.publish(kind, noise_seed=noise_seed))

    def call(self, method: str, kind: str, *args: Any) -> Any:
        return ray.get(getattr(self.samplers, method).remote(kind, *args), timeout=120)

    def generate(self, kind: str, requests: list[Request]) -> list[Trajectory]:
        trajectories, report = self.call("generate", kind, requests)
        assert report.infos == [trajectory.info for trajectory in trajectories]
        assert report.failures == []
        return trajectories


@pytest.fixture(scope="module")
def world(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path_factory.mktemp("models")
    models = {kind: tiny_llama(tied=kind == "tied") for kind in (*KINDS, PADDED)}
    with torch.no_grad():
        models[PADDED].lm_head.weight[list(UNKNOWN)] *= 5.0
    unknown, never = torch.tensor(UNKNOWN), float("-inf")
    models[PADDED].lm_head.register_forward_hook(lambda _, given, logits: logits.index_fill(-1, unknown, never))
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    facts = {
        kind: EngineFacts(model=str(folder / kind), max_model_len=256, eos_ids=(EOS,), medium="object_ref")
        for kind in KINDS
    }
    facts[PADDED] = replace(facts["untied"], model=str(folder / PADDED), unknown_ids=UNKNOWN)
    samplers = ray.remote(Samplers).options(runtime_env={"env_vars": engine_environment(SECTION)}).remote(facts)
    yield World(samplers, ray.remote(WeightStore).options(num_cpus=0).remote(), models)
    ray.kill(samplers)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    config = LlamaConfig(**shape, **ids, max_position_embeddings=512, initializer_range=0.15, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def logprobs(model: LlamaForCausalLM, ids: Any, prompt_len: int, *, temperature: float) -> np.ndarray:
    """Transformers' own, in one plain forward."""
    ids = torch.tensor(np.asarray(ids, np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1] / temperature
    chosen = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    return torch.cat([torch.zeros(prompt_len), chosen[prompt_len - 1 :]]).numpy()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def requests_of(prompts: list[list[int]], *, samples: int = 1) -> list[Request]:
    return [
        Request(
            row=row, token_ids=np.asarray(ids, np.int32), prompt_id=row, sample=sample, seed=seed_of(7, row, sample)
        )
        for row, ids in enumerate(prompts)
        for sample in range(samples)
    ]


def random_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 64, length).tolist()


def prompts() -> list[list[int]]:
    """Short ones, one longer than a cache block, and one that shares its first block."""
    long = random_prompt(0, BLOCK + 30)
    return [*(random_prompt(seed, 3 + seed) for seed in range(1, 6)), long, long[: BLOCK + 5] + random_prompt(9, 4)]


def as_rows(trajectories: list[Trajectory]) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    return {(t.prompt_id, t.sample): (t.token_ids.tobytes(), t.behavior_logprobs.tobytes()) for t in trajectories}


def test_sampling_before_any_load_is_refused(world: World) -> None:
    for kind in KINDS:
        with pytest.raises(StaleWeightsError, match="no published weights yet"):
            world.call("generate", kind, requests_of([[5, 6]]))


@pytest.mark.parametrize("kind", KINDS)
def test_after_each_sync_behaviour_logprobs_are_those_of_the_new_weights(world: World, kind: str) -> None:
    before = None
    for noise_seed in (1, 2):
        publication = world.publish(kind, noise_seed=noise_seed)
        loaded = world.call("load", kind, publication)
        assert (loaded.version, loaded.fingerprint) == (publication.version, publication.fingerprint)
        assert loaded.probe_gap < 3e-6
        assert len(publication.parts) > 1

        asked = requests_of(prompts())
        trajectories = world.generate(kind, asked[:-1]) + world.generate(kind, asked[-1:])
        for trajectory in trajectories:
            expected = logprobs(
                world.models[kind], trajectory.token_ids, trajectory.prompt_len, temperature=TEMPERATURE
            )
            np.testing.assert_allclose(trajectory.behavior_logprobs, expected, rtol=0, atol=1e-5)
            assert trajectory.policy_version == publication.version
        rows = as_rows(trajectories)
        assert rows != before, "other weights sample otherwise"
        before = rows


def test_ids_that_are_no_token_are_never_sampled_nor_counted_in_a_probability(world: World) -> None:
    for noise_seed in (1, 2):  # weights that come later are masked too
        assert world.sync(PADDED, noise_seed=noise_seed).probe_gap < 3e-6
        for trajectory in world.generate(PADDED, requests_of(prompts(), samples=4)):
            assert trajectory.token_ids[trajectory.prompt_len :].max() < UNKNOWN[0]
            expected = logprobs(
                world.models[PADDED], trajectory.token_ids, trajectory.prompt_len, temperature=TEMPERATURE
            )
            np.testing.assert_allclose(trajectory.behavior_logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_reused_until_new_weights_arrive(world: World, kind: str) -> None:
    world.sync(kind)
    *_, long, sibling = requests_of(prompts())
    assert world.call("cached_tokens", kind, [long]) == [0]
    assert world.call("cached_tokens", kind, [sibling]) == [BLOCK]
    world.sync(kind)
    assert world.call("cached_tokens", kind, [sibling]) == [0]


def test_behaviour_logprobs_are_the_learners_own(world: World) -> None:
    world.sync("tied")
    trajectory = world.generate("tied", requests_of([random_prompt(3, 9)]))[0]
    ids = torch.tensor(trajectory.token_ids, dtype=torch.long)[None]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    response = everywhere.clone()
    response[:, : trajectory.prompt_len] = False
    with torch.no_grad():
        ours = token_logprobs(world.models["tied"], ids, everywhere, response, temperature=TEMPERATURE)[0]
    np.testing.assert_allclose(trajectory.behavior_logprobs, ours.numpy(), rtol=0, atol=1e-5)


def test_tokens_are_as_sampled_with_eos_and_a_finish(world: World) -> None:
    world.sync("untied")
    asked = requests_of([random_prompt(seed, 4) for seed in range(10)], samples=3)
    trajectories = world.generate("untied", [replace(request, attempt=2) for request in asked])
    assert {trajectory.finish for trajectory in trajectories} == {Finish.EOS, Finish.LENGTH}
    for request, trajectory in zip(asked, trajectories, strict=True):
        prompt, response = np.split(trajectory.token_ids, [trajectory.prompt_len])
        np.testing.assert_array_equal(prompt, request.token_ids)
        assert (trajectory.prompt_id, trajectory.sample, trajectory.attempt) == (request.prompt_id, request.sample, 2)
        assert not trajectory.behavior_logprobs[: trajectory.prompt_len].any()
        assert (trajectory.behavior_logprobs[trajectory.prompt_len :] < 0).all()
        if trajectory.finish is Finish.EOS:
            assert response.tolist().count(EOS) == 1
            assert response[-1] == EOS
        else:
            assert len(response) == LIMIT
            assert EOS not in response
    by_prompt = {request.prompt_id: set() for request in asked}
    for trajectory in trajectories:
        by_prompt[trajectory.prompt_id].add(trajectory.token_ids.tobytes())
    assert all(len(different) > 1 for different in by_prompt.values()), "each sample has its own seed"


def test_more_prompt_tokens_than_one_step_takes_are_sampled(world: World) -> None:
    """vLLM 0.32 on a CPU cannot cut a seeded request's prompt in chunks; 4096 tokens are one step."""
    world.sync("untied")
    assert len(world.generate("untied", requests_of([random_prompt(seed, 40) for seed in range(130)]))) == 130


def test_a_call_that_failed_leaves_nothing_in_the_engine(world: World) -> None:
    """Else the next call would wait for requests that are never scheduled again."""
    world.sync("untied")
    requests = requests_of([random_prompt(seed, 4) for seed in range(6)])
    assert world.call("interrupted", "untied", requests) == 0
    assert len(world.generate("untied", requests)) == 6


def test_groups_come_out_whole_and_with_the_bits_they_have_alone(world: World) -> None:
    world.sync("untied")
    asked = requests_of(prompts(), samples=3)
    alone = as_rows(world.generate("untied", asked))
    world.sync("untied")
    groups = [asked[i : i + 8] for i in range(0, len(asked), 8)]
    made = world.call("together", "untied", groups)
    assert {report.number for _, report in made} == set(range(len(groups)))
    for trajectories, report in made:
        assert [t.prompt_id for t in trajectories] == [request.prompt_id for request in groups[report.number]]
        assert report.infos == [trajectory.info for trajectory in trajectories]
    assert as_rows([t for trajectories, _ in made for t in trajectories]) == alone


def test_no_group_is_lost_where_an_answer_cannot_be_read(world: World) -> None:
    """They end in one step; those that were read before the bad one come back too."""
    world.sync("untied")
    groups = [requests_of([random_prompt(1, 4)]) for _ in range(3)]
    groups = [[replace(request, prompt_id=number) for request in group] for number, group in enumerate(groups)]
    made, dropped, idle = world.call("unreadable", "untied", groups)
    assert sorted([*made, *dropped]) == [0, 1, 2] and 2 in dropped and idle


def test_a_group_that_is_aborted_never_comes_out_and_leaves_the_engine(world: World) -> None:
    world.sync("untied")
    first, second = requests_of([random_prompt(1, 4)]), requests_of([random_prompt(2, 4)])
    assert world.call("aborted", "untied", first, second) == ([2], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_decide_every_bit_however_requests_are_chunked(world: World, kind: str) -> None:
    asked = requests_of(prompts(), samples=3)
    chunkings: list[Callable[[], list[list[Request]]]] = [
        lambda: [asked],
        lambda: [[request] for request in reversed(asked)],
        lambda: [asked[i : i + 4] for i in range(0, len(asked), 4)],
    ]
    seen = []
    for chunks in chunkings:
        world.sync(kind)
        seen.append(as_rows([t for chunk in chunks() for t in world.generate(kind, chunk)]))
    assert seen[0] == seen[1] == seen[2]


def test_the_probe_catches_a_stale_output_head_that_fingerprints_cannot(world: World) -> None:
    """vLLM 0.32 on CPU keeps the packed old embedding as lm_head when embeddings are tied, without an error."""
    publication = world.publish("tied", noise_seed=3)
    loaded = world.call("load_without_repacking", "tied", publication)
    assert loaded.fingerprint == publication.fingerprint
    assert loaded.probe_gap > 0.05, "the trap is gone from vLLM: the repacking is no longer needed"
    assert world.sync("tied").probe_gap < 3e-6


def test_weights_behind_an_old_prefix_cache_are_refused(world: World) -> None:
    with pytest.raises(StaleWeightsError, match="reset its prefix cache"):
        world.call("load_without_cache_reset", "untied", world.publish("untied"))
    with pytest.raises(StaleWeightsError, match="no published weights yet"):
        world.call("generate", "untied", requests_of([[5, 6]]))
    world.sync("untied")
    assert world.generate("untied", requests_of([[5, 6]]))


def test_after_a_load_that_failed_nothing_is_sampled(world: World) -> None:
    publication = world.publish("untied")
    with pytest.raises(ray.exceptions.RayTaskError):
        world.call("load", "untied", replace(publication, parts=[ray.put("not a bucket")]))
    with pytest.raises(StaleWeightsError, match="no published weights yet"):
        world.call("generate", "untied", requests_of([[5, 6]]))
    assert world.call("load", "untied", publication).probe_gap < 3e-6
    assert world.generate("untied", requests_of([[5, 6]]))


def test_a_publication_without_content_is_no_load(world: World) -> None:
    """Nothing to fetch, nothing broadcast: the engine would go on with its old weights and call them new."""
    publication = world.publish("untied")
    with pytest.raises(ray.exceptions.RayTaskError, match="the publication has no content"):
        world.call("load", "untied", replace(publication, parts=[], fingerprint=""))
    with pytest.raises(StaleWeightsError, match="no published weights yet"):
        world.call("generate", "untied", requests_of([[5, 6]]))
    world.sync("untied")


def test_another_models_weights_show_in_fingerprint_and_probe(world: World) -> None:
    honest = world.publish("untied")
    other = world.publish("untied", noise_seed=4)
    loaded = world.call("load", "untied", replace(honest, parts=other.parts))
    assert loaded.fingerprint == other.fingerprint != honest.fingerprint
    assert loaded.probe_gap > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tensor_arrives_in_the_engine_with_every_bit(world: World, dtype: str) -> None:
    values = torch.tensor([[1.0, -2.5, 3.1415927], [1e-30, float("inf"), -0.0]])
    sent = list(in_transit(iter([("a", values), ("b", values.T), ("c", values[0, 0])]), dtype))
    expected = [x.to(getattr(torch, dtype)).contiguous() for x in (values, values.T, values[0, 0])]
    arrived = ray.get(world.samplers.as_torch.remote(sent))
    assert arrived == [(f"torch.{dtype}", list(x.shape), bits(x)) for x in expected]
