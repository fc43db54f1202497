"""One process of scoring: rewards that add up, at the reward model's own position, and failures that are never data."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from r3hf_ray.algorithms.redistribution import PrefixScores
from r3hf_ray.errors import ConfigError, ModelError
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.scoring import scorer as scorer_module
from r3hf_ray.scoring.readers import ReaderSettings, Reading, Sampled
from r3hf_ray.scoring.scorer import RewardModel, Scorer, ScoringSettings, load_gold
from r3hf_ray.scoring.translation import Translation, prompt_key
from r3hf_ray.sections.models import FurtherModel, ModelSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.types import COST, MAIN, Failure, Finish, ScoredTrajectory, Trajectory

EOS = 2
SUFFIX = (7, 9)
TEMPERATURE = 0.7


def trajectory(prompt_id: int, prompt_len: int, response: list[int], finish: Finish) -> Trajectory:
    ids = np.random.default_rng(prompt_id).integers(3, 39, prompt_len).tolist() + response
    behavior = np.zeros(len(ids), np.float32)
    behavior[prompt_len:] = -1.0
    return Trajectory(
        prompt_id=prompt_id,
        sample=0,
        attempt=0,
        policy_version=3,
        prompt_len=prompt_len,
        finish=finish,
        token_ids=np.asarray(ids, np.int32),
        behavior_logprobs=behavior,
    )


ENDED = trajectory(0, 4, [10, 11, 12, EOS], Finish.EOS)
CUT = trajectory(1, 6, [13, 14, 15, 16, 17], Finish.LENGTH)
SHORT = trajectory(2, 2, [EOS], Finish.EOS)
LONG = trajectory(3, 9, [20, 21, 22, 23, 24, 25, 26, 27, EOS], Finish.EOS)
ALL = [ENDED, CUT, SHORT, LONG]


@pytest.fixture(scope="module")
def settings(tiny_models: Any) -> ScoringSettings:
    return ScoringSettings(
        reward=RewardSection(),
        model=ModelSection(policy=str(tiny_models.policy), reward_model=str(tiny_models.reward)),
        temperature=TEMPERATURE,
        reads={MAIN: RewardModel(suffix_ids=SUFFIX)},
    )


def changed(settings: ScoringSettings, **reward: Any) -> ScoringSettings:
    """The same with other fields of `[reward]`."""
    return replace(settings, reward=settings.reward.model_copy(update=reward))


def with_models(settings: ScoringSettings, **model: Any) -> ScoringSettings:
    """The same with other fields of `[model]`."""
    return replace(settings, model=settings.model.model_copy(update=model))


@pytest.fixture(scope="module")
def scorer(settings: ScoringSettings) -> Scorer:
    return Scorer(settings)


@pytest.fixture(scope="module")
def several(settings: ScoringSettings, tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> ScoringSettings:
    """The same with two models besides: one of other weights, and the first one again as a cost."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward)
    model.score.weight.data.mul_(-3.0).add_(0.1)
    model.save_pretrained(folder := tmp_path_factory.mktemp("helpful"))
    rewards = (FurtherModel(name="helpful", source=str(folder)),)
    reads = {**settings.reads, COST: RewardModel(suffix_ids=SUFFIX)}
    return replace(with_models(settings, rewards=rewards, cost=settings.model.reward_model), reads=reads)


@pytest.fixture(scope="module")
def plain_score(tiny_models: Any) -> Callable[[list[int]], float]:
    """Transformers' own classifier on one unpadded row."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward).eval()

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    return score


def scored(scorer: Scorer, trajectories: list[Trajectory]) -> list[ScoredTrajectory]:
    results = scorer.score(trajectories)
    assert all(isinstance(item, ScoredTrajectory) for item in results)
    assert [item.trajectory for item in results] == trajectories
    return results


def test_score_is_read_behind_the_suffix_after_eos_and_at_the_cut_otherwise(
    scorer: Scorer, plain_score: Callable[[list[int]], float]
) -> None:
    for item in scored(scorer, ALL):
        ids = item.trajectory.token_ids.tolist()
        suffix = list(SUFFIX) if item.trajectory.finish is Finish.EOS else []
        assert item.main.score == pytest.approx(plain_score(ids + suffix), abs=2e-6)
        assert item.main.prompt_score == pytest.approx(plain_score(ids[: item.trajectory.prompt_len]), abs=2e-6)
    assert plain_score(ENDED.token_ids.tolist()) != pytest.approx(plain_score([*ENDED.token_ids, *SUFFIX]), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, lambda item: item.main.score - item.main.prompt_score),
        ({"subtract_prompt_score": False}, lambda item: item.main.score),
        ({"mode": "terminal"}, lambda item: item.main.score),
        ({"beta_c": 0.25}, lambda item: item.main.score - 0.25 * item.main.prompt_score),
    ],
)
def test_token_rewards_add_up_to_the_score(
    settings: ScoringSettings, change: dict[str, Any], expected: Callable[[ScoredTrajectory], float]
) -> None:
    for item in scored(Scorer(changed(settings, **change)), ALL):
        prompt, response = np.split(item.main.token_rewards, [item.trajectory.prompt_len])
        assert not prompt.any()
        assert response.astype(np.float64).sum() == pytest.approx(expected(item), abs=2e-6)
        if change.get("mode") == "terminal":
            assert not response[:-1].any()
            assert response[-1] == np.float32(item.main.score)


def test_each_token_earns_what_it_adds_to_the_prefix_score(
    scorer: Scorer, plain_score: Callable[[list[int]], float]
) -> None:
    (item,) = scored(scorer, [LONG])
    ids, start = LONG.token_ids.tolist(), LONG.prompt_len
    prefixes = [plain_score(ids[:end]) for end in range(start, len(ids))] + [plain_score(ids + list(SUFFIX))]
    np.testing.assert_allclose(item.main.token_rewards[start:], np.diff(prefixes), rtol=0, atol=4e-6)
    np.testing.assert_allclose(item.main.prefix_scores[start:], prefixes[1:], rtol=0, atol=2e-6)
    assert not item.main.prefix_scores[:start].any()


def test_reference_logprobs_are_at_the_sampling_temperature(scorer: Scorer, tiny_models: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy).eval()
    for item in scored(scorer, ALL):
        ids, start = torch.tensor(item.trajectory.token_ids.tolist()), item.trajectory.prompt_len
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)
        expected = [float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))]
        np.testing.assert_allclose(item.ref_logprobs[start:], expected, rtol=0, atol=1e-5)
        assert not item.ref_logprobs[:start].any()


@pytest.mark.parametrize("budget", [1, 20, 30])
def test_microbatches_change_nothing(settings: ScoringSettings, scorer: Scorer, budget: int) -> None:
    small = Scorer(changed(settings, microbatch_tokens=budget))
    for ours, theirs in zip(scored(small, ALL), scored(scorer, ALL), strict=True):
        for name in ("token_rewards", "prefix_scores", "score", "prompt_score"):
            np.testing.assert_allclose(getattr(ours.main, name), getattr(theirs.main, name), rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.ref_logprobs, theirs.ref_logprobs, rtol=0, atol=1e-5)


def test_the_same_ids_give_the_same_bits(scorer: Scorer) -> None:
    """Reward actors may be run again by Ray."""
    for first, again in zip(scored(scorer, ALL), scored(scorer, ALL), strict=True):
        assert first.main.token_rewards.tobytes() == again.main.token_rewards.tobytes()
        assert first.ref_logprobs.tobytes() == again.ref_logprobs.tobytes()


@pytest.mark.parametrize("change", [{}, {"mode": "terminal"}, {"mode": "abc"}, {"eos_jump": "drop", "beta_c": 0.5}])
def test_every_model_is_redistributed_by_the_same_rules(several: ScoringSettings, change: dict[str, Any]) -> None:
    """Each says what its model gives as the only one; the cost is the main model again."""
    alone = changed(with_models(several, rewards=(), cost=None), **change)
    helpful = replace(with_models(alone, reward_model=several.model.reward_sources["helpful"]), reads={})
    together = scored(Scorer(changed(several, **change)), ALL)
    for item, main, other in zip(together, scored(Scorer(alone), ALL), scored(Scorer(helpful), ALL), strict=True):
        assert list(item.by_model) == [MAIN, "helpful", COST]
        assert item.main.token_rewards.tobytes() == main.main.token_rewards.tobytes()
        for part, expected in ((item.by_model["helpful"], other.main), (item.by_model[COST], main.main)):
            for name in ("token_rewards", "prefix_scores"):
                assert getattr(part, name).tobytes() == getattr(expected, name).tobytes()
            assert (part.score, part.prompt_score) == (expected.score, expected.prompt_score)
        assert item.by_model["helpful"].score != item.main.score


@pytest.mark.parametrize("change", [{}, {"eos_jump": "spread"}, {"subtract_prompt_score": False}])
def test_one_models_prefixes_carry_the_others_reward(several: ScoringSettings, change: dict[str, Any]) -> None:
    """Whatever the rule for the jump at EOS, the sum is the main model's."""
    settings = changed(several, prefixes_from="helpful", **change)
    for item, plain in zip(scored(Scorer(settings), ALL), scored(Scorer(several), ALL), strict=True):
        start, helpful = item.trajectory.prompt_len, item.by_model["helpful"]
        assert (item.main.score, item.main.prompt_score) == (plain.main.score, plain.main.prompt_score)
        prefixes = item.main.prompt_score + helpful.prefix_scores[start:-1] - helpful.prompt_score
        np.testing.assert_allclose(item.main.prefix_scores[start:-1], prefixes, rtol=0, atol=4e-6)
        subtracted = 0.0 if "subtract_prompt_score" in change else item.main.prompt_score
        jump = item.main.score - (prefixes[-1] if len(prefixes) else item.main.prompt_score)
        spread = change.get("eos_jump") == "spread" and item.trajectory.finish is Finish.EOS
        each = jump / (len(prefixes) + 1) if spread else 0.0
        np.testing.assert_allclose(item.main.token_rewards[start + 1 : -1], np.diff(prefixes) + each, rtol=0, atol=4e-6)
        assert item.main.token_rewards.sum() == pytest.approx(item.main.score - subtracted, abs=4e-6)


def test_the_coordinator_hears_every_models_score(several: ScoringSettings) -> None:
    scorer = Scorer(several)
    (item,) = scored(scorer, [ENDED])
    expected = {name: part.score for name, part in item.by_model.items()}
    assert scorer.judge(item).scores == expected
    assert item.alignment_loss == 0.0


class HalfRead:
    """Runs no model: it says how far it is, and refuses rows longer than ten tokens."""

    def __init__(self, settings: ReaderSettings) -> None:
        self.settings = settings

    def read(self, batch: Sampled) -> Reading:
        count = batch.response_mask.cumsum(1).masked_fill(~batch.response_mask, 0).float()
        scores = PrefixScores(prefix=count, prompt=torch.zeros(len(count)), pooled=count.amax(1))
        long = (batch.attention_mask.sum(1) > 10).nonzero()[:, 0].tolist()
        return Reading(
            scores=scores, alignment_loss=torch.full((len(count),), 0.5), refused=dict.fromkeys(long, "it is too long")
        )


def test_another_backend_reads_the_same_samples(settings: ScoringSettings) -> None:
    scorer = Scorer(changed(settings, dtype="bfloat16"), make_reader=HalfRead)
    asked = scorer._readers[MAIN].settings
    assert (asked.source, asked.suffix_ids) == (settings.model.reward_model, SUFFIX)
    assert (asked.maps, asked.prefixes) == (False, True)
    assert (asked.dtype, asked.device) == (torch.bfloat16, "cpu")
    ended, cut, short, long = scorer.score(ALL)
    assert ended.main.token_rewards.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (ended.alignment_loss, short.main.score) == (0.5, 1.0)
    assert [item.reason for item in (cut, long)] == ["model.reward_model: it is too long"] * 2


@pytest.fixture
def foreign(settings: ScoringSettings, tiny_models: Any, tmp_path: Path) -> ScoringSettings:
    """A reward model with the same words under other ids, which starts answers with one of them."""
    words = load_tokenizer(tiny_models.policy)
    names = ["<pad>", *(f"w{i}" for i in range(36)), "<unk>", "<eos>", "<bos>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    own.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tiny_models.reward).save_pretrained(tmp_path)
    prompts = [item.token_ids[: item.prompt_len] for item in ALL]
    translation = Translation(
        prompts={prompt_key(ids): np.array(own.encode(words.decode(ids.tolist())), np.int32) for ids in prompts},
        policy_before="",
        before="w35 ",
        end_ids=(own.eos_token_id,),
        max_tokens=20,
    )
    reads = {MAIN: RewardModel(translation=translation)}
    return replace(with_models(settings, reward_model=str(tmp_path)), reads=reads)


def test_a_foreign_reward_model_reads_its_own_ids(
    foreign: ScoringSettings, plain_score: Callable[[list[int]], float]
) -> None:
    """The words meet one to one, so nothing is lost."""
    for item in scored(Scorer(foreign), ALL):
        own = [word - 3 if word > 3 else 37 for word in item.trajectory.token_ids.tolist() if word != EOS]
        start = item.trajectory.prompt_len
        prompt, response = own[:start], [36, *own[start:]]
        tail = [38] if item.trajectory.finish is Finish.EOS else []
        assert item.main.prompt_score == pytest.approx(plain_score(prompt), abs=2e-6)
        assert item.main.score == pytest.approx(plain_score(prompt + response + tail), abs=2e-6)
        assert item.main.token_rewards.sum() == pytest.approx(item.main.score - item.main.prompt_score, abs=2e-6)
        if len(response) > 1:
            first = plain_score(prompt + response[:2]) - plain_score(prompt)
            assert item.main.token_rewards[start] == pytest.approx(first, abs=4e-6)
        assert item.alignment_loss == 0.0


def test_a_foreign_reward_model_has_no_attention_to_give(foreign: ScoringSettings) -> None:
    with pytest.raises(ModelError, match=r"reward\.mode = abc: .*has none to give"):
        Scorer(changed(foreign, mode="abc")).score(ALL)


def test_nothing_to_score_is_nothing(scorer: Scorer) -> None:
    assert scorer.score([]) == []


def model_of(scorer: Scorer, name: str) -> Any:
    return scorer._reference if name == "the reference" else scorer._readers[name].model


@pytest.mark.parametrize(
    ("name", "mode", "field"),
    [
        (MAIN, "r3hf", "model.reward_model"),
        (MAIN, "terminal", "model.reward_model"),
        ("helpful", "r3hf", "model.rewards helpful"),
        (COST, "uniform", "model.cost"),
        ("the reference", "r3hf", "the reference"),
    ],
)
def test_a_number_that_is_not_finite_is_a_failure_and_the_others_stay(
    several: ScoringSettings, name: str, mode: str, field: str
) -> None:
    """Token 16, which only CUT has, breaks the model; the other rows share its microbatch."""
    broken = Scorer(changed(several, mode=mode))
    sound = broken.score(ALL)
    with torch.no_grad():
        model_of(broken, name).get_input_embeddings().weight[16] = float("nan")
    results = broken.score(ALL)
    failure = results[1]
    assert isinstance(failure, Failure)
    assert (failure.prompt_id, failure.sample, failure.call) == (1, 0, "score")
    assert failure.reason.startswith(f"{field} gives a ") and "not finite" in failure.reason
    for ours, theirs in zip(results[:1] + results[2:], sound[:1] + sound[2:], strict=True):
        np.testing.assert_array_equal(ours.main.token_rewards, theirs.main.token_rewards)


@pytest.mark.parametrize("name", [MAIN, "helpful"])
def test_prefixes_that_are_not_finite_are_the_lenders(several: ScoringSettings, name: str) -> None:
    """They are in the main model's rewards too, whose own score is sound."""
    broken = Scorer(changed(several, prefixes_from="helpful"))
    with torch.no_grad():
        model_of(broken, name).get_input_embeddings().weight[16] = float("nan")
    failure = broken.score([CUT])[0]
    assert isinstance(failure, Failure)
    field = "model.reward_model" if name == MAIN else "model.rewards helpful"
    assert failure.reason.startswith(f"{field} gives a score")


def test_the_policys_tokenizer_spells_what_was_sampled(
    several: ScoringSettings, foreign: ScoringSettings, tiny_models: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For the translation, the ends of sentences and the judge; the reference needs none of its own."""
    shutil.copytree(tiny_models.policy, bare := tmp_path_factory.mktemp("bare") / "reference")
    for file in bare.glob("*token*"):
        file.unlink()
    judged = changed(foreign, gold="math:dist", mode="segment", segment_by="ngram")
    ours, theirs = (scored(Scorer(with_models(judged, reference=source)), ALL) for source in (str(bare), None))
    for one, other in zip(ours, theirs, strict=True):
        assert one.main.token_rewards.tobytes() == other.main.token_rewards.tobytes()
    with pytest.raises(ModelError, match="no token ends a sentence"):
        Scorer(changed(with_models(several, reference=str(bare)), mode="segment", segment_by="sentence"))


def test_a_reward_head_that_is_nan_never_becomes_data(settings: ScoringSettings) -> None:
    broken = Scorer(settings)
    model_of(broken, MAIN).score.weight.data.fill_(float("nan"))
    assert [type(item) for item in broken.score(ALL)] == [Failure] * len(ALL)


def test_results_have_the_trajectorys_length_and_no_batch_behind_them(scorer: Scorer) -> None:
    """A view would carry the padded batch through the object store."""
    for item in scored(scorer, ALL):
        for array in (item.main.token_rewards, item.main.prefix_scores, item.ref_logprobs):
            assert array.shape == item.trajectory.token_ids.shape
            assert torch.from_numpy(array).untyped_storage().nbytes() == array.nbytes
            assert array.base is None or array.base.nbytes == array.nbytes


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that a user might have."""
    lines = ["heard = []", "def length(prompt, response):", "    heard.append((prompt, response))"]
    source = "\n".join([*lines, "    return len(response.split())"])
    (tmp_path / "my_judges.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_judges", raising=False)
    return "my_judges"


def test_the_gold_judge_hears_prompt_and_response_as_text(settings: ScoringSettings, judges: str) -> None:
    scorer = Scorer(changed(settings, gold=f"{judges}:length"))
    infos = [scorer.judge(item) for item in scored(scorer, [ENDED, CUT])]
    assert [info.gold for info in infos] == [4.0, 5.0]
    assert all(type(info.gold) is float for info in infos)
    heard = sys.modules[judges].heard
    assert heard[0][1] == "w6 w7 w8 <eos>", "special tokens are kept"
    assert heard[1] == (" ".join(f"w{i - 4}" for i in CUT.token_ids[:6]), "w9 w10 w11 w12 w13")


def test_without_a_judge_there_is_no_gold_score(scorer: Scorer) -> None:
    (item,) = scored(scorer, [ENDED])
    info = scorer.judge(item)
    assert info.gold is None
    assert info == replace(ENDED.info, scores={MAIN: item.main.score})


@pytest.mark.parametrize("name", ["my_judges:absent", "no_such_module:length", "my_judges", ":length", ""])
def test_a_judge_that_is_not_there_is_a_configuration_error(judges: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.gold: .*write package\.module:function"):
        load_gold(name)


def test_a_reference_that_nothing_uses_is_not_loaded(
    settings: ScoringSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(scorer_module, "load_policy", lambda source, *_, **__: loaded.append(source))
    without = Scorer(replace(settings, refers=False))
    assert loaded == []
    for item, given in zip(without.score(ALL), ALL, strict=True):
        assert isinstance(item, ScoredTrajectory)
        assert (item.ref_logprobs == given.behavior_logprobs).all()
