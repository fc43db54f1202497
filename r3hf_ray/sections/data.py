"""Where examples come from."""

from typing import Literal

from r3hf_ray.sections.fields import NonNegative, Positive, Section

RowFormat = Literal[
    "auto",
    "messages",
    "preference",
    "hh",
    "prompt",
    "ranked",
    "safe_rlhf",
    "safe_rlhf_cost",
    "tldr_pairs",
    "nectar",
    "arena",
    "helpsteer",
]
"""Shapes of a row that are read."""


class DataSection(Section):
    """Where prompts, dialogues or preferences come from."""

    source: str
    """A hub name (`Anthropic/hh-rlhf`) or a local .jsonl, .jsonl.gz, .json, .parquet or .csv file."""
    config: str | None = None
    """Configuration name of a hub dataset."""
    data_dir: str | None = None
    """Folder inside a hub dataset, as HH-RLHF has them (`harmless-base`)."""
    split: str = "train"
    """Split of a hub dataset."""
    format: RowFormat = "auto"
    """Shape of a row: `messages` (chat, ShareGPT), `preference` (prompt/chosen/rejected), `hh` (chosen/rejected
    dialogues), `prompt` (alone, or with its completion: question/answer, instruction/input/output), `ranked` (prompt,
    responses, scores or pairs), `arena` (response_a, response_b, winner), `helpsteer` (preference_strength), or a
    published dataset's own; `safe_rlhf_cost` prefers the less safe answer, for a cost model."""
    max_prompt_tokens: Positive = 512
    """Longest rendered prompt; a longer one is counted, listed with its line number, and left out. [tokens]"""
    limit: Positive | None = None
    """Use only the first `limit` usable rows after `skip`. [rows]"""
    skip: NonNegative = 0
    """Leave out the first `skip` usable rows. [rows]"""
    heldout: NonNegative = 0
    """Rows at the end of the selection kept for evaluation, never trained on. [rows]"""
    split_by: Literal["prompt", "row"] = "prompt"
    """`prompt`: a training row whose prompt is held out too is counted and left out. `row`: it stays, for data whose
    prompts repeat by design (the toy world has 24)."""
