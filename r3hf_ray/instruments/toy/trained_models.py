"""The toy world, the initial policy and the reward models below one folder; each is made once and found again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from r3hf_ray.config import RewardConfig, SFTConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.toy.settings import FurtherRewardModel, ToySection
from r3hf_ray.instruments.toy.world import make_ranked, make_world
from r3hf_ray.prepare import StageResult, train_reward, train_sft
from r3hf_ray.records.run_folder import STAGE_MAY_CHANGE, STAGE_MAY_MOVE, check_run
from r3hf_ray.settings import load

PROMPT_TOKENS = 16
"""More than a toy prompt has."""
GOLD_SUFFIX = {24: "_24", 48: "", 96: "_96"}
"""Longest response -> end of the names of its judge and its token credit in `toy.language`."""
OF_TRAINING = {"sft_job", "reward_job", "reward_models"}
"""Fields of `[toy]` that the world and the preferences are not made from; `world.json` keeps the others."""


@dataclass(frozen=True, slots=True)
class ToyModels:
    """What `[toy]` asks for, below a folder: there already, or still to be made.

    Example: ``ToyModels(ToySection(), Path("runs/quickstart")).policy == Path("runs/quickstart/sft/model")``
    """

    toy: ToySection
    root: Path

    @property
    def world(self) -> Path:
        """Base model, answers to imitate, prompts."""
        return self.root / "world"

    @property
    def made_from(self) -> Path:
        """The settings behind the world and the preferences."""
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
        """The reward model that pays."""
        return self.root / "reward/model"

    def complete(self) -> bool:
        """Whether all of it is made."""
        further = (self.root / model.name / "model" for model in self.toy.reward_models)
        return all(path.exists() for path in (self.world, self.ranked, self.policy, self.reward_model, *further))

    def check(self) -> None:
        """See that what is there was made from these settings; else a page would show settings that made nothing.

        Raises:
            ConfigError: the world or a model was made from others.
        """
        if self.made_from.exists():
            was = json.loads(self.made_from.read_text())
            for name, value in self._world_settings().items():
                if was[name] != value:
                    raise ConfigError(
                        f"toy.{name}: the world in {self.root} was made with {was[name]!r}, not {value!r}; set it "
                        "back, or give the comparison another run.name"
                    )
        sft, rewards = self.stages()
        stages: list[SFTConfig | RewardConfig] = [sft, *rewards]
        for stage in stages:
            if (stage.run.folder / stage.run.name / "model").exists():
                check_run(stage, stage.run, resume=True, may_change=STAGE_MAY_CHANGE, may_move=STAGE_MAY_MOVE)

    def overrides(self) -> list[str]:
        """Fields of a PPO job that name these models, prompts and judges."""
        language, suffix = "r3hf_ray.instruments.toy.language", GOLD_SUFFIX[self.toy.max_response_tokens]
        return [
            *("--model.policy", str(self.policy), "--model.reward_model", str(self.reward_model)),
            *("--data.source", str(self.world / "prompts.jsonl"), "--data.heldout", str(self.toy.heldout_prompts)),
            *("--data.split_by", "row"),  # 24 prompts, which repeat by design
            *("--rollout.max_response_tokens", str(self.toy.max_response_tokens)),
            *("--reward.gold", f"{language}:gold_reward{suffix}"),
            *("--reward.gold_credit", f"{language}:token_credit{suffix}"),
        ]

    def stages(self) -> tuple[SFTConfig, list[RewardConfig]]:
        """Fine-tuning and the reward models, first of all the one that pays.

        Raises:
            ConfigError: a job cannot be read.
        """

        def stage(name: str, seed: int, base: Path, source: Path) -> list[str]:
            run = ["--run.folder", str(self.root), "--run.name", name, "--run.seed", str(seed)]
            return [*run, "--model.base", str(base), "--data.source", str(source)]

        toy, tokens = self.toy, str(self.toy.max_response_tokens + PROMPT_TOKENS)
        own = stage("sft", toy.seed, self.world / "base", self.world / "sft.jsonl")
        sft = load(SFTConfig, toy.sft_job, [*own, "--sft.max_tokens", tokens])
        size = ["--data.heldout", str(toy.heldout_pairs), "--data.split_by", "row"]
        size += ["--reward_training.max_tokens", tokens]
        rewards = []
        for model in (FurtherRewardModel(name="reward", seed=toy.seed), *toy.reward_models):
            own = stage(model.name, model.seed, self.policy, self.ranked)
            rewards.append(load(RewardConfig, toy.reward_job, [*own, *size, *model.overrides]))
        return sft, rewards

    def prepare(
        self, console: Console, *, on_row: Callable[[Mapping[str, Any]], None] = lambda row: None
    ) -> tuple[StageResult, list[StageResult]]:
        """Make what is not there yet; needs Ray. A file or folder of that name is whole: it was named when done.

        Args:
            console: for progress.
            on_row: takes each row of metrics of the training stages.

        Returns:
            Fine-tuning and the reward models, as `stages` has them.

        Raises:
            ConfigError: a stage cannot start, or what is there was made from other settings.
            RunFailed: it failed.
        """
        self.check()
        sft, rewards = self.stages()
        if not self.world.exists():
            _rule(console, "world", f"writing the toy world to {self.world}")
            part = self.root / "world.part"
            make_world(part, self.toy)
            part.rename(self.world)
            self.made_from.write_text(json.dumps(self._world_settings(), indent=1) + "\n")
        _rule(console, "sft", "the initial policy, from the noisy author's texts")
        policy = train_sft(sft, resume=True, on_row=on_row, note=console.print)
        console.print(f"initial policy: {policy.model}  ({policy.seconds:.0f} s)", markup=False)
        _rule(console, "rm", "the reward model, from noisy preferences")
        if not self.ranked.exists():
            part = self.ranked.with_name("ranked.part.jsonl")
            make_ranked(self.policy, part, self.toy)
            part.rename(self.ranked)
        judges = []
        for reward in rewards:
            judges.append(judge := train_reward(reward, resume=True, on_row=on_row, note=console.print))
            accuracy = judge.metrics.get("eval/heldout/pair_accuracy")
            agrees = "" if accuracy is None else f", {accuracy:.3f} of held-out pairs right"
            console.print(f"reward model: {judge.model}{agrees}  ({judge.seconds:.0f} s)", markup=False)
        return policy, judges

    def _world_settings(self) -> dict[str, Any]:
        return self.toy.model_dump(exclude=OF_TRAINING)


def _rule(console: Console, name: str, text: str) -> None:
    console.rule(f"[bold]{name}[/bold]  {escape(text)}", align="left")
