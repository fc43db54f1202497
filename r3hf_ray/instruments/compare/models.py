"""The toy world, initial policy and reward model that all arms share; each part is made once and found again."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from r3hf_ray.config import RewardConfig, SFTConfig, load
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.compare.settings import FurtherRewardModel, ToySection
from r3hf_ray.instruments.toy.world import make_ranked, make_world
from r3hf_ray.prepare import train_reward, train_sft
from r3hf_ray.records.run_folder import STAGE_MAY_CHANGE, STAGE_MAY_MOVE, check_run

PROMPT_TOKENS = 16
"""More than a toy prompt has."""
GOLD = {24: "gold_reward_24", 48: "gold_reward", 96: "gold_reward_96"}
GOLD_CREDIT = {24: "token_credit_24", 48: "token_credit", 96: "token_credit_96"}


@dataclass(frozen=True, slots=True)
class ToyPaths:
    """Where the shared parts are, made or not."""

    root: Path

    @property
    def world(self) -> Path:
        """Base model, answers to imitate, prompts."""
        return self.root / "world"

    @property
    def settings(self) -> Path:
        """What the world and the preferences were made from."""
        return self.root / "world.json"

    @property
    def ranked(self) -> Path:
        """Preferences."""
        return self.root / "ranked.jsonl"

    @property
    def policy(self) -> Path:
        """The initial policy."""
        return self.root / "sft/model"

    @property
    def reward_model(self) -> Path:
        """The reward model."""
        return self.root / "reward/model"

    def complete(self, toy: ToySection) -> bool:
        """Whether all that ``toy`` asks for is made."""
        further = (self.root / model.name / "model" for model in toy.reward_models)
        return all(path.exists() for path in (self.world, self.ranked, self.policy, self.reward_model, *further))


WORLD = ("seed", "max_response_tokens", "sft_rows", "train_prompts", "heldout_prompts", "groups", "heldout_pairs")
"""Fields of `[toy]` that the world and the preferences are made from; `world.json` keeps them."""


def check_toy(toy: ToySection, paths: ToyPaths) -> None:
    """See that what is there was made from these settings; else the page would show settings that made nothing.

    Raises:
        ConfigError: the world or a model was made from others.
    """
    if paths.settings.exists():
        was = json.loads(paths.settings.read_text())
        for name in WORLD:
            if was[name] != dict(toy)[name]:
                raise ConfigError(
                    f"toy.{name}: the world in {paths.root} was made with {was[name]!r}, not {dict(toy)[name]!r}; set "
                    "it back, or give the comparison another run.name"
                )
    sft, rewards = stage_configs(toy, paths)
    stages: list[SFTConfig | RewardConfig] = [sft, *rewards]
    for stage in stages:
        if (stage.run.folder / stage.run.name / "model").exists():
            check_run(stage, stage.run, resume=True, may_change=STAGE_MAY_CHANGE, may_move=STAGE_MAY_MOVE)


def toy_overrides(toy: ToySection, paths: ToyPaths) -> list[str]:
    """Fields of the PPO job that name the shared parts."""
    return [
        *("--model.policy", str(paths.policy), "--model.reward_model", str(paths.reward_model)),
        *("--data.source", str(paths.world / "prompts.jsonl"), "--data.heldout", str(toy.heldout_prompts)),
        *("--rollout.max_response_tokens", str(toy.max_response_tokens)),
        *("--reward.gold", f"r3hf_ray.instruments.toy.language:{GOLD[toy.max_response_tokens]}"),
        *("--reward.gold_credit", f"r3hf_ray.instruments.toy.language:{GOLD_CREDIT[toy.max_response_tokens]}"),
    ]


def stage_configs(toy: ToySection, paths: ToyPaths) -> tuple[SFTConfig, list[RewardConfig]]:
    """Fine-tuning as quickstart runs it, and the reward models, first of all the quickstart's.

    Raises:
        ConfigError: a job cannot be read.
    """
    tokens = str(toy.max_response_tokens + PROMPT_TOKENS)
    common = ["--run.folder", str(paths.root)]
    data = [
        "--run.seed",
        str(toy.seed),
        "--model.base",
        str(paths.world / "base"),
        "--data.source",
        str(paths.world / "sft.jsonl"),
    ]
    sft = load(SFTConfig, toy.sft_job, [*common, "--run.name", "sft", *data, "--sft.max_tokens", tokens])
    data = ["--model.base", str(paths.policy), "--data.source", str(paths.ranked)]
    size = ["--data.heldout", str(toy.heldout_pairs), "--reward_training.max_tokens", tokens]
    plain = FurtherRewardModel(name="reward", seed=toy.seed)
    rewards = [
        load(
            RewardConfig,
            toy.reward_job,
            [*common, "--run.name", model.name, "--run.seed", str(model.seed), *data, *size, *model.overrides],
        )
        for model in (plain, *toy.reward_models)
    ]
    return sft, rewards


def prepare_toy(toy: ToySection, paths: ToyPaths, console: Console) -> None:
    """Make what is not there yet; needs Ray. A file or folder of that name is whole: it got its name when it was done.

    Raises:
        ConfigError: a stage cannot start, or what is there was made from other settings.
        RunFailed: it failed.
    """
    check_toy(toy, paths)
    sft, rewards = stage_configs(toy, paths)
    if not paths.world.exists():
        console.print(f"writing the toy world to {paths.world}", markup=False)
        part = paths.root / "world.part"
        make_world(
            part,
            max_response_tokens=toy.max_response_tokens,
            seed=toy.seed,
            sft_rows=toy.sft_rows,
            train_prompts=toy.train_prompts,
            heldout_prompts=toy.heldout_prompts,
        )
        part.rename(paths.world)
        paths.settings.write_text(json.dumps({name: dict(toy)[name] for name in WORLD}, indent=1) + "\n")
    made = train_sft(sft, resume=True, note=console.print)
    console.print(f"initial policy: {made.model}  ({made.seconds:.0f} s)", markup=False)
    if not paths.ranked.exists():
        part = paths.ranked.with_name("ranked.part.jsonl")
        make_ranked(
            paths.policy,
            part,
            max_response_tokens=toy.max_response_tokens,
            seed=toy.seed,
            groups=toy.groups,
            heldout_pairs=toy.heldout_pairs,
        )
        part.rename(paths.ranked)
    for reward in rewards:
        judged = train_reward(reward, resume=True, note=console.print)
        accuracy = judged.metrics.get("eval/heldout/pair_accuracy")
        agrees = "" if accuracy is None else f", {accuracy:.3f} of held-out pairs right"
        console.print(f"reward model: {judged.model}{agrees}  ({judged.seconds:.0f} s)", markup=False)
