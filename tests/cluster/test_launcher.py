"""cluster/launcher: `ray up` takes each file, tokens are on everywhere, and the job fits what is up from the start."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from r3hf_ray import __version__
from r3hf_ray.config import PPOConfig
from r3hf_ray.settings import load

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster" / "launcher").iterdir())
CLOUDS = [path for path in FILES if path.name != "onprem.yaml"]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())

files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
clouds = pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_is_a_file_for_each_provider() -> None:
    assert {path.name: read(path)["provider"]["type"] for path in FILES} == {
        "aws.yaml": "aws",
        "gcp.yaml": "gcp",
        "onprem.yaml": "local",
    }


@files
def test_ray_takes_it(path: Path) -> None:
    config = read(path)
    jsonschema.validate(config, SCHEMA)
    whole = prepare_config(copy.deepcopy(config))  # with Ray's defaults, as `ray up` does it
    validate_config(whole)
    assert sum(kind["min_workers"] for kind in whole["available_node_types"].values()) <= whole["max_workers"]


MISTAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a misspelt field": lambda config: config.update(max_worker=2),
    "a number in quotes": lambda config: config.update(max_workers="2"),
    "no provider": lambda config: config.pop("provider"),
    "a node type without resources": lambda config: config["available_node_types"]["learner"].pop("resources"),
    "a label that is no text": lambda config: config["available_node_types"]["rollout"].update(labels={"a": 1}),
    "an option that is no list": lambda config: config["docker"].update(run_options="--gpus=all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    config = read(CLOUDS[0])
    MISTAKES[mistake](config)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, SCHEMA)


@files
def test_every_node_presents_the_token_and_hides_the_dashboard(path: Path) -> None:
    config = read(path)
    options = config["docker"]["run_options"]
    [token] = [option.split("=", 2)[2] for option in options if option.startswith("--env=RAY_AUTH_TOKEN_PATH=")]
    assert "--env=RAY_AUTH_MODE=token" in options
    assert config["file_mounts"] == {token: "~/.ray/auth_token"}
    [head] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head and "--num-gpus=0" in head
    assert "--autoscaling-config" in head, "or no node is ever added"
    assert not [option for option in options if "TOKEN=" in option or "KEY=" in option]


@files
def test_runs_lie_on_what_every_node_mounts(path: Path) -> None:
    config = read(path)
    assert "--volume=/mnt/runs:/runs" in config["docker"]["run_options"]
    assert "--run.folder /runs" in (ROOT / "cluster" / "launcher" / "onprem.yaml").read_text()
    assert "local" in config["provider"]["type"] or any(
        "/mnt/runs" in line and "mount -t nfs" in line for line in config["initialization_commands"]
    )


@files
def test_the_image_is_this_version_for_gpus(path: Path) -> None:
    assert read(path)["docker"]["image"].rsplit("/", 1)[-1] == f"r3hf_ray:{__version__}-gpu"


@clouds
def test_what_is_up_from_the_start_holds_the_job(path: Path) -> None:
    types = read(path)["available_node_types"]
    job = load(PPOConfig, ROOT / "jobs" / "qwen2_hub.toml", [])
    assert types["learner"]["min_workers"] * types["learner"]["resources"]["GPU"] == job.learner.ranks
    assert types["rollout"]["min_workers"] * types["rollout"]["resources"]["GPU"] == job.rollout.actors
    assert types["reward"]["min_workers"] * types["reward"]["resources"]["GPU"] == job.reward.actors
    assert all(t["resources"]["CPU"] >= job.learner.cpus_per_rank for name, t in types.items() if name != "head")
    assert sum(t.get("max_workers", 0) for t in types.values()) == read(path)["max_workers"]


@clouds
def test_the_learner_stays_and_the_rest_is_spot(path: Path) -> None:
    types = read(path)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    for name, kind in types.items():
        spot = "spot" in json.dumps(kind["node_config"]) or "preemptible" in json.dumps(kind["node_config"])
        assert spot is (name in ("rollout", "reward"))
        if name != "head":
            assert kind["labels"] == {"ray.io/market-type": "spot" if spot else "on-demand"}
