"""What the checks before a PPO run find out, warn of, and hand to the actors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Model, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.models.chat_format import FORMAT_FILE
from r3hf_ray.planning.placement import cluster_of
from r3hf_ray.planning.plan import make_plan
from r3hf_ray.planning.processes import GIB
from r3hf_ray.planning.transfers import Links
from r3hf_ray.preflight import check, check_memory, check_resources, probe_sequence
from r3hf_ray.scoring.translation import prompt_key
from r3hf_ray.types import COST, MAIN

EOS = 2
LINKS = Links.of_gbit(node=100.0, storage=10.0)


@pytest.fixture
def configure(tmp_path: Path, tiny_models: Any) -> Callable[..., PPOConfig]:
    """`configure(rollout={...})`: a PPO configuration on twenty prompts, the last four held out."""
    rows = ({"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(20))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "folder": tmp_path / "runs"},
        "model": {"policy": str(tiny_models.policy), "reward_model": str(tiny_models.reward)},
        "data": {"source": str(tmp_path / "prompts.jsonl"), "heldout": 4},
        "rollout": {"max_response_tokens": 12},
    }

    def make(**sections: dict[str, Any]) -> PPOConfig:
        return PPOConfig(**{name: given.get(name, {}) | sections.get(name, {}) for name in {*given, *sections}})

    return make


def test_the_plan_of_a_run(configure: Callable[..., PPOConfig]) -> None:
    plan = check(configure(weights={"probe_tokens": 160}))
    assert (len(plan.prompts), len(plan.heldout)) == (16, 4)
    assert plan.report.used == 20
    assert (plan.engine.eos_ids, plan.scoring.reads[MAIN].suffix_ids) == ((EOS,), ())
    assert plan.warnings == ["weights.probe_tokens = 160: the models read 64, so that 63 are used"]
    assert plan.engine.max_model_len == 64, "the window bounds the probe"
    assert len(plan.probe_ids) == 63
    longest = max(len(prompt) for prompt in [*plan.prompts, *plan.heldout])
    assert check(configure(weights={"probe_tokens": 0})).engine.max_model_len == longest + 12


def test_a_reward_models_own_suffix_is_read(configure: Callable[..., PPOConfig]) -> None:
    assert check(configure(reward={"pooling_suffix": "w5"})).scoring.reads[MAIN].suffix_ids == (9,)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"critic": {"init": "reward_model"}}, "counts the prefix score twice"),
        ({"ppo": {"gamma": 0.9}}, "ppo.gamma < 1"),
        ({"rollout": {"max_lag": 1}}, "without ppo.importance_cap"),
    ],
    ids=["double count", "gamma", "off-policy"],
)
def test_what_is_allowed_but_doubtful_is_a_warning(
    configure: Callable[..., PPOConfig], sections: dict[str, dict[str, Any]], words: str
) -> None:
    (warning,) = check(configure(**sections)).warnings
    assert words in warning


def test_several_models_need_a_scale_each_and_a_critic_of_their_sum(
    configure: Callable[..., PPOConfig], tiny_models: Any
) -> None:
    models = {"policy": str(tiny_models.policy), "reward_model": str(tiny_models.reward)}
    several: dict[str, Any] = {"model": models | {"cost": str(tiny_models.reward)}, "reward": {"mode": "terminal"}}
    several["cost"] = {"limit": 0.5}
    assert check(configure(**several)).warnings == []
    (critic,) = check(configure(**several, critic={"init": "reward_model"})).warnings
    assert "model.reward_model alone" in critic
    several["reward"]["calibration_samples"] = 0
    (scale,) = check(configure(**several)).warnings
    assert "reward.calibration_samples = 0" in scale
    several["cost"] = {"multiplier": 0.0, "multiplier_lr": 0.0}
    assert check(configure(**several, critic={"init": "reward_model"})).warnings == [], "it is only logged"


def test_what_is_right_in_terminal_mode_is_no_warning(configure: Callable[..., PPOConfig]) -> None:
    assert check(configure(reward={"mode": "terminal"}, critic={"init": "reward_model"})).warnings == []


@pytest.fixture
def save_reward(tiny_models: Any, tmp_path: Path) -> Callable[..., str]:
    """`save_reward(names, merges=...)`: the tiny reward model beside a tokenizer with other ids, as a folder."""

    def save(names: list[str], model: type[Model] = WordLevel, **options: Any) -> str:
        folder = tmp_path / "reward"
        shutil.copytree(tiny_models.reward, folder)
        backend = Tokenizer(model({name: i for i, name in enumerate(names)}, unk_token="<unk>", **options))
        backend.pre_tokenizer = WhitespaceSplit() if model is WordLevel else None
        PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(folder)
        return str(folder)

    return save


OTHER_ORDER = ["<pad>", "<unk>", "<eos>", "<bos>", "Human:", "Assistant:", *(f"w{i}" for i in range(30))]


def models(tiny_models: Any, reward_model: str, **further: Any) -> dict[str, Any]:
    return {"policy": str(tiny_models.policy), "reward_model": reward_model} | further


def test_a_reward_model_of_another_prompt_format_reads_its_own(
    configure: Callable[..., PPOConfig], tiny_models: Any, tmp_path: Path
) -> None:
    """It has the policy's vocabulary, so that the critic may still start from it."""
    shutil.copytree(tiny_models.reward, tmp_path / "reward")
    form = {"version": 1, "chat_template": "w7 {{ messages[0]['content'] }}", "before": " ", "end": "w8", "suffix": ""}
    (tmp_path / "reward" / FORMAT_FILE).write_text(json.dumps(form))
    plan = check(configure(model=models(tiny_models, str(tmp_path / "reward"))))
    translation = plan.scoring.reads[MAIN].translation
    assert translation is not None and translation.end_ids == (12,)
    prompt = translation.prompts[prompt_key(plan.prompts[0])]
    assert prompt.tolist() == [11, *plan.prompts[0][-4:-1]]
    assert "0.0% of the policy's tokens" in plan.warnings[0]
    assert plan.config.critic_init == "reward_trunk"


def test_a_reward_model_of_another_tokenizer(
    configure: Callable[..., PPOConfig], tiny_models: Any, save_reward: Callable[..., str]
) -> None:
    """Every prompt has a translation, the held-out ones too, and the critic starts from the policy."""
    config = configure(model=models(tiny_models, save_reward(OTHER_ORDER)))
    plan = check(config)
    translation = plan.scoring.reads[MAIN].translation
    assert translation is not None
    assert translation.prompts.keys() == {prompt_key(ids) for ids in [*plan.prompts, *plan.heldout]}
    assert next(iter(translation.prompts.values())).tolist() == [4, 6, 7, 8, 5]
    assert (config.critic_init, plan.config.critic_init) == ("reward_trunk", "sft")
    critic, warning = plan.warnings
    assert "starts from the policy" in critic and "ppo.gae_lambda = 1" in critic
    assert warning.startswith("model.reward_model: ") and "0.0% of the policy's tokens" in warning
    settings = plan.scoring
    assert settings.reads == {MAIN: plan.scoring.reads[MAIN]} and settings.reads[MAIN].translation == translation


def test_every_model_has_its_own_tokens_and_suffix(
    configure: Callable[..., PPOConfig], tiny_models: Any, save_reward: Callable[..., str]
) -> None:
    foreign = {"name": "helpful", "source": save_reward(OTHER_ORDER)}
    given = models(tiny_models, str(tiny_models.reward), rewards=[foreign], cost=str(tiny_models.reward))
    plan = check(config := configure(model=given, reward={"pooling_suffix": "w5"}, cost={"limit": 0.0}))
    assert list(plan.scoring.reads) == [MAIN, "helpful", COST]
    assert [model.suffix_ids for model in plan.scoring.reads.values()] == [(9,), (), ()]
    assert [model.translation is None for model in plan.scoring.reads.values()] == [True, False, True]
    assert plan.warnings[-1].startswith("model.rewards helpful: ")
    assert plan.config == config, "the critic's start is another model"
    settings = plan.scoring
    assert (settings.reads, settings.model) == (plan.scoring.reads, config.model)


@pytest.mark.parametrize(("setting", "read"), [("auto", (7,)), ("none", ()), ("w5", (7,))])
def test_further_models_read_their_own_suffix_or_none(
    configure: Callable[..., PPOConfig], tiny_models: Any, tmp_path: Path, setting: str, read: tuple[int, ...]
) -> None:
    """A text given for the main model is not theirs."""
    shutil.copytree(tiny_models.reward, tmp_path / "further")
    form = {"version": 1, "chat_template": None, "before": " ", "end": "<eos>", "suffix": "w3"}
    (tmp_path / "further" / FORMAT_FILE).write_text(json.dumps(form))
    further = {"name": "helpful", "source": str(tmp_path / "further")}
    given = models(tiny_models, str(tiny_models.reward), rewards=[further])
    plan = check(configure(model=given, reward={"pooling_suffix": setting}))
    assert plan.scoring.reads["helpful"].suffix_ids == read


def reference(tiny_models: Any, folder: Path, **config: Any) -> Path:
    """The policy's folder again, with some numbers of its config.json changed."""
    shutil.copytree(tiny_models.policy, folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def test_the_reference_reads_the_sampled_ids(
    configure: Callable[..., PPOConfig], tiny_models: Any, save_reward: Callable[..., str], tmp_path: Path
) -> None:
    models = {"policy": str(tiny_models.policy), "reward_model": str(tiny_models.reward)}
    same, short = reference(tiny_models, tmp_path / "same"), tmp_path / "short"
    plan = check(configure(model=models | {"reference": str(same)}))
    settings = plan.scoring
    assert (settings.model.reference, settings.model.policy) == (str(same), str(tiny_models.policy))
    reference(tiny_models, short, max_position_embeddings=16)
    with pytest.raises(ConfigError, match=r"model\.reference: .*short can read 16 tokens, .* has 17"):
        check(configure(model=models | {"reference": str(short)}))
    with pytest.raises(ConfigError, match=r"model\.reference: .* differs from the policy's in 40 tokens"):
        check(configure(model=models | {"reference": save_reward(OTHER_ORDER)}))
    with pytest.raises(ConfigError, match="/absent: no such folder for the reference"):
        check(configure(model=models | {"reference": "/absent"}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"reward": {"mode": "abc"}}, r"model\.reward_model: .*another tokenizer .*reward\.mode = abc"),
        ({"critic": {"init": "reward_trunk"}}, r"critic\.init = reward_trunk: the critic reads the policy's tokens"),
        ({"critic": {"init": "reward_model"}}, r"critic\.init = reward_model: .*use critic\.init = sft"),
        ({"rollout": {"max_response_tokens": 59}}, r"model\.reward_model: .* can read 63 tokens, and the longest"),
    ],
    ids=["attention", "trunk", "head", "window"],
)
def test_what_another_tokenizer_cannot_do(
    configure: Callable[..., PPOConfig],
    tiny_models: Any,
    save_reward: Callable[..., str],
    sections: dict[str, dict[str, Any]],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(configure(model=models(tiny_models, save_reward(OTHER_ORDER)), **sections))


def test_a_critic_of_its_own_folder_must_read_the_policys_tokens(
    configure: Callable[..., PPOConfig], tiny_models: Any, save_reward: Callable[..., str]
) -> None:
    foreign = save_reward(OTHER_ORDER)
    config = configure(model=models(tiny_models, foreign), critic={"source": str(tiny_models.reward)})
    assert check(config).config == config
    with pytest.raises(ConfigError, match=r"critic\.init = reward_trunk: .* use critic\.init = sft without critic"):
        check(configure(critic={"source": foreign}))


def test_a_critic_that_is_not_loaded_may_be_named(
    configure: Callable[..., PPOConfig], tiny_models: Any, save_reward: Callable[..., str]
) -> None:
    sections = {"ppo": {"advantage": "r3hf_baseline"}, "critic": {"init": "reward_trunk"}}
    config = configure(model=models(tiny_models, save_reward(OTHER_ORDER)), **sections)
    assert check(config).config == config


def test_text_that_does_not_meet_is_refused_where_prefixes_are_read(
    configure: Callable[..., PPOConfig], tiny_models: Any, save_reward: Callable[..., str]
) -> None:
    """It knows none of the words but one of three."""
    model = models(tiny_models, save_reward([*OTHER_ORDER[:6], *(f"w{i}" for i in range(2, 24, 3))]))
    with pytest.raises(ConfigError, match=r"model\.reward_model: 6\d% .*reward\.max_alignment_loss \(0\.2\)"):
        check(configure(model=model))
    check(configure(model=model, reward={"mode": "terminal"}))
    assert "% of the policy's tokens" in check(configure(model=model, reward={"max_alignment_loss": 0.7})).warnings[-1]


def test_every_model_must_read_the_longest_response(configure: Callable[..., PPOConfig], tiny_models: Any) -> None:
    """The suffix behind it too: 5 + 59 tokens fill the window."""
    with pytest.raises(ConfigError, match=r"model\.reward_model: .* can read 63 tokens"):
        check(configure(rollout={"max_response_tokens": 59}, reward={"pooling_suffix": "w5"}))


def test_vllm_is_not_asked_for_attention(configure: Callable[..., PPOConfig]) -> None:
    check(configure(reward={"backend": "vllm"}))
    with pytest.raises(ConfigError, match=r"reward\.backend = vllm gives no attention"):
        check(configure(reward={"backend": "vllm", "mode": "abc"}))


@pytest.mark.parametrize(("cpus", "fits"), [(1.5, True), (1.49, False)])
def test_resources_are_summed(configure: Callable[..., PPOConfig], cpus: float, fits: bool) -> None:
    config = configure()  # 1 x 0.3 + 2 x 0.2 + 2 x 0.4
    if fits:
        check_resources(config, {"CPU": cpus})
    else:
        with pytest.raises(ConfigError, match=r"1\.5 CPUs .* the cluster has 1\.49"):
            check_resources(config, {"CPU": cpus})


def test_gpus_are_resources_too(configure: Callable[..., PPOConfig]) -> None:
    config = configure(rollout={"gpus_per_actor": 1.0, "actors": 2}, reward={"gpus_per_actor": 0.5})
    check_resources(config, {"CPU": 8.0, "GPU": 3.0})
    with pytest.raises(ConfigError, match=r"3 GPUs .* has 2"):
        check_resources(config, {"CPU": 8.0, "GPU": 2.0})


def test_the_probe_repeats_the_prompts() -> None:
    prompts = [np.array([1, 5], np.int32), np.array([1, 6, 7], np.int32)]
    assert probe_sequence(prompts, 8) == [1, 5, 1, 6, 7, 1, 5, 1]
    assert probe_sequence(prompts, 0) == []


def test_the_policys_ends_and_its_ids_without_a_token_are_in_the_plan(
    configure: Callable[..., PPOConfig], cases: Path, padded_policy: Path
) -> None:
    models = {"reward_model": str(cases / "ok_rm")}
    plan = check(configure(model=models | {"policy": str(cases / "policy_eos_is_not_template_end")}))
    assert (plan.engine.eos_ids, plan.engine.unknown_ids) == ((256, 258), ())
    padded = check(configure(model=models | {"policy": str(padded_policy)}))
    assert padded.engine.unknown_ids == tuple(range(259, 266))


def test_models_without_a_window_have_no_limit(configure: Callable[..., PPOConfig], cases: Path) -> None:
    names = {"policy": str(cases / "policy_no_window"), "reward_model": str(cases / "rm_no_window")}
    plan = check(configure(model=names, rollout={"max_response_tokens": 100_000}))
    assert plan.engine.max_model_len == max(len(prompt) for prompt in [*plan.prompts, *plan.heldout]) + 100_000


def test_a_policy_that_opens_a_thought_or_classifies_is_refused(
    configure: Callable[..., PPOConfig], cases: Path
) -> None:
    for name, said in [("policy_opens_a_thought", "asks for an answer behind"), ("ok_rm", "is a LlamaForSequence")]:
        models = {"policy": str(cases / name), "reward_model": str(cases / "ok_rm")}
        with pytest.raises(ConfigError, match=said):
            check(configure(model=models))


def test_what_this_machine_can_never_hold_is_refused(configure: Callable[..., PPOConfig]) -> None:
    config = configure(rollout={"kv_cache_gb": 4, "max_response_tokens": 12})
    check_memory(config, cluster_of(nodes=1, gpus=0, cpu_gib=64.0))
    with pytest.raises(
        ConfigError, match=r"needs about \d+\.\d GiB of host memory .* has 2\.0 GiB.*20% too high.*r3hf plan"
    ):
        check_memory(config, cluster_of(nodes=1, gpus=0, cpu_gib=2.0))
    near = max(node.on_host for node in make_plan(config, cluster_of(nodes=1, gpus=0), LINKS).nodes) / GIB
    check_memory(config, cluster_of(nodes=1, gpus=0, cpu_gib=0.85 * near))  # a plan may be that much too high


def test_a_gpu_that_is_too_small_is_refused(configure: Callable[..., PPOConfig]) -> None:
    config = configure(learner={"gpus_per_rank": 1.0, "ranks": 1})
    with pytest.raises(ConfigError, match=r"GiB of a GPU and this machine has 0\.5 GiB"):
        check_memory(config, cluster_of(nodes=1, gpus=1, gpu_gib=0.5, cpu_gib=64.0))
