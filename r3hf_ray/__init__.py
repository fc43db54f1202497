"""Distributed RLHF on Ray with token-level rewards from an ordinary reward model (R3HF, arXiv 2411.08302)."""

__version__ = "0.1.0"
