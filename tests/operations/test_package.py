"""What a job takes along, and what is refused before anything is sent."""

from pathlib import Path

import pytest

from r3hf_ray.errors import ConfigError
from r3hf_ray.operations import package
from r3hf_ray.operations.package import packed, refuse_secrets, require_packable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {"job.toml": 10, "big.bin": 5000, "bigger.bin": 9000, "keys.env": 3, "in/a.py": 2}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in packed(folder))


def test_ignore_files_of_every_folder_are_heard_and_keys_stay_here(folder: Path) -> None:
    assert names(folder) == ["big.bin", "bigger.bin", "in/a.py", "job.toml"]
    (folder / ".rayignore").write_text("/big*.bin\n")
    (folder / "in" / ".rayignore").write_text("a.py\n")
    assert names(folder) == [".rayignore", "in/.rayignore", "job.toml"]


def test_too_much_is_refused_with_the_largest_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_packable(folder, folder / "job.toml") == 14012
    monkeypatch.setattr(package, "GCS_STORAGE_MAX_SIZE", 10_000)
    with pytest.raises(ConfigError, match=r"Ray takes .*the largest: bigger\.bin .*, big\.bin .*\.rayignore"):
        require_packable(folder, folder / "job.toml")


def test_a_job_file_that_would_not_be_there_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / ".rayignore").write_text("job.toml\n")
    with pytest.raises(ConfigError, match=r"job\.toml: is not sent"):
        require_packable(folder, folder / "job.toml")
    with pytest.raises(ConfigError, match="is not sent"):
        require_packable(folder, tmp_path_factory.mktemp("other") / "job.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--tracking.api_key", "x"),
        ("--model.hf_token", "x"),
        ("--data.source", "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/x"),
        ("--run.name", "hf_" + "a" * 24),
        ("the job file", 'project = "sk-' + "a" * 24 + '"'),
    ],
)
def test_what_looks_like_a_key_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: looks like a key.*--env-file"):
        refuse_secrets({name: value})


def test_ordinary_settings_are_no_keys() -> None:
    refuse_secrets({"--rollout.max_response_tokens": "96", "--model.policy": "hf-internal-testing/tiny-random-Llama"})
    refuse_secrets({"--data.source": "https://example.org/a@b/rows.jsonl", "--toy.author": "x"})
