"""Which curves the report draws, in which order, and the sentence under each; then the charts with their numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from r3hf_ray.instruments.pages.parts import Chart, PageSection, Series
from r3hf_ray.records.metrics import STEP

MetricRows = Sequence[Mapping[str, float]]
"""Lines of `metrics.jsonl`."""
MAX_POINTS = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a figure.

    Example: ``Line("eval/heldout/gold/mean", "held-out", band="eval/heldout/gold/sem")``
    """

    metric: str
    label: str
    band: str = ""
    """Metric whose value is drawn as a half-width around the curve."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart over training steps; it is left out when no row has any of its metrics."""

    title: str
    unit: str
    sentence: str
    """For a reader who has not seen the code."""
    lines: tuple[Line, ...]
    stacked: tuple[Line, ...] = ()
    """Drawn as stacked bars below the lines."""
    log: bool = False
    """Logarithmic vertical axis."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Chapter:
    """A part of the report: some figures under one question."""

    id: str
    title: str
    intro: str
    figures: tuple[Figure, ...]


LEARNING = Chapter(
    "learning",
    "Is it learning?",
    "Rewards should rise while the distance to the reference stays bounded and responses keep ending by themselves.",
    (
        Figure(
            "Gold reward",
            "gold",
            "An independent judge that is never trained on; if the reward model's score rises and this does not, the "
            "policy exploits the reward model. The band is one standard error.",
            (
                Line("reward/gold/mean", "training batch"),
                Line("eval/heldout/gold/mean", "held-out prompts", band="eval/heldout/gold/sem"),
            ),
        ),
        Figure(
            "Reward model score",
            "score",
            "What the policy is trained to raise: the reward model's score of whole responses. The band is one "
            "standard deviation over the batch.",
            (
                Line("reward/score/mean", "training batch", band="reward/score/std"),
                Line("eval/heldout/score/mean", "held-out prompts"),
            ),
        ),
        Figure(
            "KL to the reference",
            "nats a response",
            "How far the policy has moved from where it started; a steep climb with a flat gold reward is "
            "over-optimisation.",
            (Line("kl/ref/mean", "KL"),),
        ),
        Figure(
            "Reward minus KL",
            "scaled reward",
            "The quantity PPO maximises: scaled reward of a response less the price of moving away from the reference.",
            (Line("reward/total/mean", "reward minus KL"),),
        ),
        Figure(
            "Response length",
            "tokens",
            "Growth without a rise in gold reward means the reward model likes length.",
            (
                Line("rollout/response_length/mean", "mean"),
                Line("rollout/response_length/max", "longest"),
                Line("eval/heldout/response_length/mean", "held-out, mean"),
            ),
        ),
        Figure(
            "How responses end",
            "share",
            "A response should end itself; the rest are cut at the token limit.",
            (
                Line("rollout/eos_frac", "ended by the policy"),
                Line("rollout/truncated_frac", "cut at the limit"),
                Line("eval/heldout/eos_frac", "held-out, ended"),
            ),
        ),
    ),
)

CREDIT = Chapter(
    "credit",
    "Where does the reward go?",
    "R3HF pays each token the change it makes in the reward model's score; the token rewards of a response must sum to "
    "the score of the whole.",
    (
        Figure(
            "Reward of a token",
            "scaled reward",
            "Mean and spread over all response tokens; a spread near 0 means that hardly any token is told apart.",
            (Line("r3hf/token_reward/mean", "mean", band="r3hf/token_reward/std"),),
        ),
        Figure(
            "Concentration",
            "share, correlation",
            "Part of the absolute reward that sits on the last token (1 would be the sparse baseline), and whether "
            "late tokens earn more than early ones.",
            (Line("r3hf/last_token_mass", "on the last token"), Line("r3hf/position_corr", "correlation with place")),
        ),
        Figure(
            "Telescoping error",
            "relative",
            "Largest gap between the sum of a response's token rewards and its score; it must stay at rounding error.",
            (Line("r3hf/telescoping_error/max", "largest error"),),
            log=True,
        ),
        Figure(
            "Score of the prompt alone",
            "score",
            "Subtracted at the first token so that the policy is not paid for the prompt.",
            (Line("r3hf/empty_prefix_score/mean", "R(x, empty)"),),
        ),
    ),
)

UPDATE = Chapter(
    "update",
    "Is the update healthy?",
    "PPO takes small steps: most tokens stay inside the clip range and the critic predicts a good part of the returns.",
    (
        Figure(
            "Explained variance of the critic",
            "share",
            "1 is a perfect prediction of the returns, 0 no better than a constant, below 0 worse than that.",
            (Line("critic/explained_var", "explained variance"),),
        ),
        Figure(
            "Step size of the policy",
            "share, nats a token",
            "Tokens that hit the clip, and the KL of one update; both rise when the learning rate is too high.",
            (Line("policy/clipfrac", "clipped tokens"), Line("policy/approx_kl", "KL of the update")),
        ),
        Figure(
            "Entropy of the policy",
            "nats a token",
            "How undecided the policy is at a token; a fall to 0 means it always says the same.",
            (Line("policy/entropy", "entropy"),),
        ),
        Figure(
            "Losses",
            "",
            "Clipped losses a token; the policy's hovers around 0 by construction.",
            (Line("policy/loss", "policy"), Line("critic/loss", "critic")),
        ),
        Figure(
            "Gradient norms",
            "",
            "Before clipping; single spikes are clipped away, a steady climb is a warning.",
            (Line("policy/grad_norm", "policy"), Line("critic/grad_norm", "critic")),
        ),
        Figure(
            "Values, returns, advantages",
            "scaled reward",
            "What the critic expects and what came; the band is the spread of advantages before whitening.",
            (
                Line("critic/values/mean", "values"),
                Line("critic/returns/mean", "returns"),
                Line("critic/advantages/mean", "advantages", band="critic/advantages/std"),
            ),
        ),
    ),
)

SYSTEM = Chapter(
    "system",
    "Where does the time go?",
    "Rollout actors generate, reward actors score, learner ranks train, and the new weights go back to the samplers.",
    (
        Figure(
            "Seconds by stage",
            "s a step",
            "Bars are the time each stage was busy, the line is the whole step; where stages overlap, the bars are "
            "higher than the line.",
            (Line("time/step", "whole step"), Line("time/wait_rollout", "learner waiting")),
            stacked=(
                Line("time/rollout", "generate"),
                Line("time/reward", "score"),
                Line("time/evaluate", "logprobs and values"),
                Line("time/advantage", "advantages"),
                Line("time/train_policy", "train policy"),
                Line("time/train_critic", "train critic"),
                Line("time/sync", "send weights"),
            ),
            wide=True,
        ),
        Figure(
            "Throughput",
            "tokens/s",
            "Tokens trained on, a second of wall clock.",
            (Line("perf/tokens_per_sec", "tokens/s"),),
        ),
        Figure(
            "Learner against sampler",
            "nats",
            "The same tokens' logprobs, computed by the learner and by vLLM; a jump means stale or wrong weights.",
            (
                Line("kl/sampler/logp_absdiff_mean", "mean gap"),
                Line("kl/sampler/logp_absdiff_max", "largest gap"),
                Line("sync/probe_gap", "probe after the sync"),
            ),
            log=True,
        ),
        Figure(
            "Staleness",
            "steps",
            "Weights versions between sampling a response and learning from it; 0 is synchronous PPO.",
            (Line("async/staleness/mean", "mean"), Line("async/staleness/max", "largest")),
        ),
        Figure(
            "Failures",
            "samples",
            "Samples made again or given up after a failure; none of them is trained on as if it were an answer.",
            (Line("rollout/retried", "retried"), Line("rollout/failed", "quarantined")),
        ),
    ),
)


CHAPTERS = (LEARNING, CREDIT, UPDATE, SYSTEM)


def chapter_section(chapter: Chapter, rows: MetricRows, events: Sequence[int]) -> list[PageSection]:
    """The chapter with those figures that have a number to draw; ``events`` are vertical lines."""
    charts = [chart for figure in chapter.figures if (chart := _chart(figure, rows, events)).series]
    intro = chapter.intro + (" Dotted vertical lines are failures and restarts." if events else "")
    return [PageSection(id=chapter.id, title=chapter.title, intro=intro, charts=charts)] if charts else []


def _chart(figure: Figure, rows: MetricRows, events: Sequence[int]) -> Chart:
    drawn = [(line, True) for line in figure.stacked] + [(line, False) for line in figure.lines]
    return Chart(
        title=figure.title,
        unit=figure.unit,
        sentence=figure.sentence,
        kind="lines",
        series=[found for line, stacked in drawn if (found := _series(line, rows, stacked)).x],
        x_title="step",
        y_axis="log" if figure.log else "from zero",
        events=events,
        wide=figure.wide,
    )


def _series(line: Line, rows: MetricRows, stacked: bool) -> Series:
    steps, values = series(rows, line.metric)
    widths = dict(zip(*series(rows, line.band), strict=True)) if line.band else {}
    points = [(step, value, widths.get(step, 0.0)) for step, value in zip(steps, values, strict=True)]
    points = thinned(points)
    return Series(
        label=line.label,
        x=[step for step, _, _ in points],
        y=[value for _, value, _ in points],
        low=[value - width for _, value, width in points] if widths else (),
        high=[value + width for _, value, width in points] if widths else (),
        stacked=stacked,
    )


def series(rows: MetricRows, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is a finite number."""
    points = [(int(row[STEP]), row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    return [step for step, _ in points], [value for _, value in points]


def thinned(points: list[T]) -> list[T]:
    """At most about `MAX_POINTS` of a list, evenly, the last always kept."""
    stride = math.ceil(len(points) / MAX_POINTS) if points else 1
    return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
