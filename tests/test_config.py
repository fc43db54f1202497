"""Configuration: what is read, what wins, and one sentence for each mistake."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from r3hf_ray.config import PPOConfig, RewardConfig, SFTConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.records.run_folder import to_toml
from r3hf_ray.settings import load

PPO = """
[run]
name = "a-run"
[model]
policy = "models/policy"
reward_model = "models/reward"
[data]
source = "prompts.jsonl"
[ppo]
steps = 7
"""
BREVITY = """
[[model.rewards]]
name = "brevity"
source = "b"
"""
EARLY = '[{"name": "early", "source": "e", "weight": 0}]'
FIXED = ("--cost.multiplier_lr", "0")
SAME_NAME = BREVITY + BREVITY.replace('"b"', '"c"')
TRAINER = """
[run]
name = "a-run"
[model]
base = "models/base"
[data]
source = "pairs.jsonl"
"""


def toml(folder: Path, text: str = PPO) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def problem(folder: Path, text: str = PPO, overrides: list[str] | None = None) -> str:
    path = toml(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(PPOConfig, path, overrides or [])
    return str(caught.value).replace(f"{path}: ", "job.toml: ")


def test_file_over_defaults(tmp_path: Path) -> None:
    config = load(PPOConfig, toml(tmp_path), [])
    assert (config.run.name, config.ppo.steps, config.ppo.epochs) == ("a-run", 7, 2)
    assert (config.reward.mode, config.reward.beta_c, config.reward.subtract_prompt_score) == ("r3hf", 1.0, True)


@pytest.mark.parametrize("schema", [SFTConfig, RewardConfig])
def test_trainers_share_the_sections(tmp_path: Path, schema: type[SFTConfig] | type[RewardConfig]) -> None:
    config = load(schema, toml(tmp_path, TRAINER), ["--trainer.ranks", "2"])
    assert (config.model.base, config.trainer.ranks, config.data.format) == ("models/base", 2, "auto")


def test_command_line_over_file(tmp_path: Path) -> None:
    overrides = ["--ppo.steps", "3", "--run.name=other", "--model.reference", "models/ref"]
    config = load(PPOConfig, toml(tmp_path), [*overrides, "--optimizer.betas", "[0.9,0.95]"])
    assert (config.ppo.steps, config.run.name, config.model.reference) == (3, "other", "models/ref")
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.model.policy == "models/policy", "an override leaves the rest of its section alone"


def test_last_override_wins(tmp_path: Path) -> None:
    assert load(PPOConfig, toml(tmp_path), ["--ppo.steps", "3", "--ppo.steps", "4"]).ppo.steps == 4


@pytest.mark.parametrize(("word", "value"), [("false", False), ("true", True)])
def test_booleans_take_a_value(tmp_path: Path, word: str, value: bool) -> None:
    config = load(PPOConfig, toml(tmp_path), ["--reward.subtract_prompt_score", word])
    assert config.reward.subtract_prompt_score is value


def test_engine_arguments_pass_through(tmp_path: Path) -> None:
    text = PPO + "[rollout.engine_args]\nenforce_eager = true\nmax_model_len = 96\n"
    assert load(PPOConfig, toml(tmp_path, text), []).rollout.engine_args == {"enforce_eager": True, "max_model_len": 96}


def test_environment_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("PPO='{\"steps\": 9}'\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RUN", "run", "PPO", "ppo.steps", "PPO__STEPS", "DATA"):
        monkeypatch.setenv(name, "x")
    config = load(PPOConfig, toml(tmp_path), [])
    assert (config.run.name, config.ppo.steps, config.data.source) == ("a-run", 7, "prompts.jsonl")


def test_frozen(tmp_path: Path) -> None:
    config = load(PPOConfig, toml(tmp_path), [])
    with pytest.raises(ValidationError, match="frozen"):
        config.ppo.steps = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (PPO + "stepz = 3\n", "job.toml: ppo.stepz: no such field; did you mean ppo.steps? (r3hf ppo --help all lists"),
        (PPO + "[pppo]\nsteps = 3\n", "job.toml: pppo: no such field; did you mean ppo? (r3hf ppo"),
        (PPO.replace("steps = 7", "steps = 'many'"), "job.toml: ppo.steps: must be a valid integer"),
        (PPO.replace("steps = 7", "steps = 0"), "job.toml: ppo.steps: must be greater than 0; got 0"),
        (PPO.replace("steps = 7", "steps = 1.5"), "job.toml: ppo.steps: "),
        (PPO + "gamma = 1.1\n", "job.toml: ppo.gamma: must be less than or equal to 1; got 1.1"),
        (
            PPO + "[reward]\nmode = 'dense'\n",
            "job.toml: reward.mode: no method 'dense'; choose r3hf, segment, abc, uniform, terminal",
        ),
        (PPO + "[reward]\nmode = 'my-module:f'\n", "job.toml: reward.mode: no method 'my-module:f'; choose r3hf"),
        (PPO + "dual_clip = 1.0\n", "job.toml: ppo.dual_clip: must be greater than 1; got 1.0"),
        (
            PPO.replace('name = "a-run"', 'name = "../up"'),
            "job.toml: run.name: '../up' cannot be a name: use",
        ),
        (PPO.replace('policy = "models/policy"', ""), "job.toml: model.policy: must be set"),
        (PPO + SAME_NAME, "job.toml: model.rewards: each needs a name of its own, not reward or cost; change brevity"),
        (PPO + BREVITY.replace("brevity", "cost"), "job.toml: model.rewards: each needs a name of its own"),
        (
            PPO + BREVITY.replace('"brevity"', '"Not a name"'),
            "job.toml: model.rewards.0.name: 'Not a name' cannot be",
        ),
        (PPO + BREVITY + "weight = nan\n", "job.toml: model.rewards.0.weight: must be a finite number"),
        (PPO + BREVITY.replace('source = "b"', ""), "job.toml: model.rewards.0.source: must be set"),
        (PPO.replace("[run]", "[run"), "job.toml: cannot be read as TOML: Expected ']' at the end"),
        (PPO + "seed = 3\n", "job.toml: ppo.seed: no such field; did you mean run.seed? (r3hf ppo --help all"),
        (PPO + BREVITY + "wieght = 2\n", "job.toml: model.rewards.0.wieght: no such field; did you mean model."),
        (PPO.replace("steps = 7", "steps = true"), "job.toml: ppo.steps: must not be a switch; got True"),
        (PPO.replace("steps = 7", "steps = -7"), "job.toml: ppo.steps: must be greater than 0; got -7"),
        (PPO + "whiten_advantages = 'yess'\n", "job.toml: ppo.whiten_advantages: must be a valid boolean"),
        (PPO + "kl_coef = inf\n", "job.toml: ppo.kl_coef: must be a finite number; got inf"),
        (PPO + "kl_coef = nan\n", "job.toml: ppo.kl_coef: must be a finite number; got nan"),
        (PPO + "[optimizer]\nbetas = [0.9, 1.0]\n", "job.toml: optimizer.betas.1: must be less than 1; got 1.0"),
        ("cost = 3\n" + PPO, "job.toml: cost: must be a section: write [cost] and its fields below it; got 3"),
        (PPO + "[sft]\nepochs = 1\n", "job.toml: [sft] is for r3hf sft, and this is r3hf ppo"),
        (TRAINER + "[reward_training]\n", "job.toml: [reward_training] is for r3hf reward, and this is r3hf ppo"),
    ],
)
def test_one_sentence_for_a_wrong_field(tmp_path: Path, text: str, sentence: str) -> None:
    found = problem(tmp_path, text)
    assert found.startswith(sentence)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--rollout.top_p", "0.9"], ["rollout.top_p must be 1"]),
        (["--rollout.top_k", "50"], ["rollout.top_k must be -1"]),
        (["--rollout.min_actors", "2"], ["rollout.actors = 1", "rollout.min_actors"]),
        (["--reward.max_actors", "1"], ["reward.actors = 2", "reward.max_actors"]),
        (["--learner.ranks", "17"], ["ppo.minibatches (2)", "learner.ranks (17)", "32 responses"]),
        (["--ppo.advantage", "rloo"], ["ppo.advantage = rloo", "rollout.samples_per_prompt must be at least 2"]),
        (
            ["--ppo.advantage", "grpo", "--rollout.samples_per_prompt", "2", "--reward.mode", "uniform"],
            ["ppo.advantage = grpo", "needs reward.mode = r3hf, segment or terminal", "uniform"],
        ),
        (
            ["--ppo.advantage", "reinforce_pp", "--ppo.whiten_advantages", "false"],
            ["ppo.advantage = reinforce_pp", "ppo.whiten_advantages must stay true"],
        ),
        (
            ["--ppo.advantage", "r3hf_baseline", "--reward.mode", "terminal"],
            ["ppo.advantage = r3hf_baseline", "reward.mode = r3hf or segment"],
        ),
        (["--ppo.advantage", "r3hf_baseline", "--reward.beta_c", "0.5"], ["r3hf_baseline", "reward.beta_c = 1"]),
        (["--reward.mode", "abc", "--reward.beta_c", "0.5"], ["reward.beta_c must stay 1", "reward.abc_beta"]),
        (["--reward.mode", "uniform", "--reward.eos_jump", "drop"], ["reward.eos_jump = drop", "uniform"]),
        (["--cost.limit", "1.5"], ["cost.limit needs a cost model: set model.cost"]),
        (["--cost.multiplier", "2", "--cost.multiplier_lr", "0"], ["cost.multiplier, cost.multiplier_lr needs"]),
        (
            ["--model.cost", "c", *FIXED, "--cost.multiplier", "3", "--cost.max_multiplier", "2"],
            ["cost.multiplier (3)", "cost.max_multiplier (2)"],
        ),
        (["--model.reward_weight", "0"], ["model.reward_weight = 0 leaves no model"]),
        (
            ["--model.reward_weight", "0", "--model.cost", "c", *FIXED, "--cost.multiplier", "0"],
            ["model.reward_weight = 0 leaves no model"],
        ),
        (["--model.attention", "flash_attention_2", "--learner.dtype", "bfloat16"], ["flash_attention_2 needs GPUs"]),
        (
            ["--ppo.old_logprobs", "sampler", "--ppo.importance_cap", "2"],
            ["ppo.importance_cap", "old_logprobs = learner"],
        ),
        (["--learner.ranks", "3", "--learner.replicas", "2"], ["learner.replicas (2) must divide learner.ranks (3)"]),
        (["--model.cost", "c"], ["cost.limit must be set", "cost.multiplier_lr = 0"]),
        (["--critic.init", "sft", "--critic.source", "s"], ["critic.init = sft", "does not read critic.source"]),
        (
            ["--model.rewards", EARLY, "--reward.prefixes_from", "early", "--reward.eos_jump", "drop"],
            ["reward.prefixes_from = early", "reward.eos_jump = drop", "use keep or spread"],
        ),
        (["--reward.prefixes_from", "early"], ["reward.prefixes_from = early is none of [[model.rewards]] (empty)"]),
        (
            ["--reward.mode", "terminal", "--reward.prefixes_from", "early"],
            ["reward.prefixes_from needs a mode that reads prefixes", "reward.mode = terminal"],
        ),
        (
            ["--model.reward_weight", "0", "--model.cost", "c", *FIXED, "--critic.init", "reward_model"],
            ["critic.init = reward_model", "model.reward_weight must be above 0"],
        ),
    ],
)
def test_rules_between_fields_name_both_sides(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    found = problem(tmp_path, overrides=overrides)
    assert not [word for word in words if word not in found], found


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    found = problem(tmp_path, PPO + "stepz = 3\nepochs = 0\n")
    assert [line.split(": ")[1] for line in sorted(found.splitlines())] == ["ppo.epochs", "ppo.stepz"]


@pytest.mark.parametrize("flag", ["--ppo.stepz", "--nonsense"])
def test_unknown_override_is_an_error(tmp_path: Path, flag: str) -> None:
    assert flag.removeprefix("--") in problem(tmp_path, overrides=[flag, "3"])


def test_wrong_override_names_the_field(tmp_path: Path) -> None:
    assert "ppo.steps" in problem(tmp_path, overrides=["--ppo.steps", "many"])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        load(PPOConfig, tmp_path / "absent.toml", [])


def test_a_folder_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder; name a TOML file"):
        load(PPOConfig, tmp_path, [])


@pytest.mark.parametrize(
    ("mode", "init", "expected"),
    [
        ("r3hf", "auto", "reward_trunk"),
        ("terminal", "auto", "reward_model"),
        ("terminal", "sft", "sft"),
        ("r3hf", "reward_model", "reward_model"),
        ("uniform", "auto", "reward_trunk"),
        ("segment", "auto", "reward_trunk"),
        ("package.module:function", "auto", "reward_trunk"),
    ],
)
def test_critic_default_follows_the_mode(tmp_path: Path, mode: str, init: str, expected: str) -> None:
    config = load(PPOConfig, toml(tmp_path), ["--reward.mode", mode, "--critic.init", init])
    assert config.critic_init == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["--model.cost", "c", *FIXED],
        ["--model.cost", "c", "--cost.multiplier", "0", "--cost.limit", "1"],
        ["--model.rewards", '[{"name": "brevity", "source": "b"}]'],
        ["--model.reward_weight", "-1"],
    ],
)
def test_a_critic_that_knows_one_model_of_several_is_no_default(tmp_path: Path, overrides: list[str]) -> None:
    config = load(PPOConfig, toml(tmp_path), ["--reward.mode", "terminal", *overrides])
    assert config.critic_init == "reward_trunk"


@pytest.mark.parametrize(
    "overrides", [["--model.rewards", EARLY], ["--model.cost", "c", *FIXED, "--cost.multiplier", "0"]]
)
def test_a_model_that_is_only_logged_changes_nothing(tmp_path: Path, overrides: list[str]) -> None:
    config = load(PPOConfig, toml(tmp_path), ["--reward.mode", "terminal", *overrides])
    assert (config.summed, config.critic_init) == ({"reward"}, "reward_model")


def test_a_price_that_can_rise_is_trained_on(tmp_path: Path) -> None:
    """Of a limit that was given, were it the default's number: a run's own config.toml gives every field."""
    rises = ["--model.reward_weight", "0", "--model.cost", "c", "--cost.multiplier", "0", "--cost.limit", "0"]
    config = load(PPOConfig, toml(tmp_path), rises)
    assert config.summed == {"cost"}
    assert load(PPOConfig, toml(tmp_path, to_toml(config)), []) == config


def test_several_models(tmp_path: Path) -> None:
    text = PPO.replace("[data]", 'reward_weight = 0.5\ncost = "c"\n[data]') + BREVITY + BREVITY.replace("brev", "grav")
    config = load(PPOConfig, toml(tmp_path, text + "weight = -2\n"), list(FIXED))
    assert config.summed == {"reward", "brevity", "gravity", "cost"}
    model = config.model
    assert list(model.weights(3.0).items()) == [("reward", 0.5), ("brevity", 1.0), ("gravity", -2.0), ("cost", -3.0)]
    placed = model.placed(lambda source: f"/here/{source}")
    assert [one.source for one in placed.rewards] == ["/here/b", "/here/b"]
    assert (placed.policy, placed.reward_model) == ("/here/models/policy", "/here/models/reward")
    assert (placed.cost, placed.reference) == ("/here/c", None)
    assert placed.weights(3.0) == model.weights(3.0)


@pytest.mark.parametrize(
    ("mode", "beta_c", "weight"),
    [
        ("r3hf", "1.0", 0.0),
        ("r3hf", "0.25", 0.75),
        ("terminal", "1.0", 1.0),
        ("terminal", "0.25", 1.0),
        ("uniform", "0.25", 0.75),
        ("segment", "1.0", 0.0),
        ("mine:f", "0.25", 0.75),
    ],
)
def test_terminal_weight(tmp_path: Path, mode: str, beta_c: str, weight: float) -> None:
    config = load(PPOConfig, toml(tmp_path), ["--reward.mode", mode, "--reward.beta_c", beta_c])
    assert config.terminal_weight == weight
    assert config.reward.method_weight == 1.0 - weight


def test_abc_mixes_by_its_own_beta(tmp_path: Path) -> None:
    reward = load(PPOConfig, toml(tmp_path), ["--reward.mode", "abc", "--reward.abc_beta", "0.25"]).reward
    assert (reward.method_weight, reward.facts.pays_shares, reward.facts.reads_prefixes) == (0.25, True, False)


def test_responses_per_step(tmp_path: Path) -> None:
    assert load(PPOConfig, toml(tmp_path), ["--rollout.samples_per_prompt", "4"]).responses_per_step == 128


def test_a_dumped_config_loads_again(tmp_path: Path) -> None:
    config = load(PPOConfig, toml(tmp_path), [])
    again = PPOConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert tomllib.loads(PPO)["ppo"]["steps"] == again.ppo.steps
