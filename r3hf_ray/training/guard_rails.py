"""What in a step's metrics a person should look at before the run goes on: plain numbers in, sentences out."""

from collections.abc import Mapping

WATCHED = ("rollout/response_length/mean", "rollout/eos_frac")
"""Metrics whose first value is kept, to compare later ones with."""
LENGTH_DRIFT = 0.3
"""Relative change of the mean response length that is worth a warning."""
EOS_DROP = 0.5
"""Share of the first step's EOS rate below which there is one."""

BOUNDS: dict[str, tuple[float, float, str]] = {
    "r3hf/eos_jump_mass": (
        0.0,
        0.8,
        "nearly all prefix differences are the jump at EOS, so this is close to a sparse reward; see reward.eos_jump",
    ),
    "r3hf/first_token_mass": (
        0.0,
        0.5,
        "most of the credit is on the first token; is it the prompt's offset (reward.subtract_prompt_score)?",
    ),
    "r3hf/sum_abs_over_std": (
        0.0,
        20.0,
        "token rewards are far larger than what tells responses apart and cancel: mostly noise",
    ),
    "r3hf/position_corr": (-0.5, 0.5, "credit follows the position in the response, not what is said there"),
    "r3hf/telescoping_error/max": (
        0.0,
        1e-5,
        "token rewards add up worse than float32 should; is the score head in float32?",
    ),
    "r3hf/alignment_loss": (
        0.0,
        0.1,
        "these tokens end inside a token of the reward model and earn 0: the two tokenizers cut text too differently",
    ),
    "critic/explained_var": (
        -0.5,
        1.0,
        "the critic predicts returns worse than a constant would; lower its learning rate or start it elsewhere",
    ),
    "policy/eps_share": (
        0.0,
        0.5,
        "Adam's epsilon takes most of each update away: set optimizer.eps = 1e-8",
    ),
    "policy/positive_advantages": (
        0.05,
        0.95,
        "nearly all advantages have one sign: the baseline and the rewards are on different scales",
    ),
}
"""Metric -> lowest and highest value without a warning, and what is wrong beyond them."""


def length_drift(metrics: Mapping[str, float], first: Mapping[str, float]) -> float:
    """Relative change of the mean response length since the first step."""
    return metrics["rollout/response_length/mean"] / first["rollout/response_length/mean"] - 1.0


def warnings_of(metrics: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """One sentence for each metric that has left its bounds, by the metric's name.

    A metric that is absent or NaN gives none.

    Example: a mean length of 71 tokens after 48 at first -> ``{"rollout/response_length/mean":
    "rollout/response_length/mean is 71: +48% since the first step; read samples before going on"}``.

    Args:
        metrics: of a PPO step.
        first: of the first step; `WATCHED` is enough.
    """
    found = {}
    drift, eos, eos_first = length_drift(metrics, first), metrics["rollout/eos_frac"], first["rollout/eos_frac"]
    if abs(drift) > LENGTH_DRIFT:
        found["rollout/response_length/mean"] = f"{drift:+.0%} since the first step; read samples before going on"
    if eos == 0.0 or eos < EOS_DROP * eos_first:
        found["rollout/eos_frac"] = (
            f"{eos_first:.3g} at first; responses do not end: see rollout.max_response_tokens and reward.missing_eos"
        )
    for name, (low, high, sentence) in BOUNDS.items():
        value = metrics.get(name, low)
        if value < low or value > high:
            found[name] = sentence
    return {name: f"{name} is {metrics[name]:.3g}: {sentence}" for name, sentence in found.items()}
