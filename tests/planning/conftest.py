"""Models that planning reads: their configurations alone."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from made.model_configs import write_hub_cache


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations that jobs name lie in the hub's cache, and there is no network."""
    write_hub_cache(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
