import subprocess

from r3hf_ray.records.provenance import git_commit, redacted, versions


def test_secrets_are_starred_and_numbers_of_tokens_are_not():
    settings = {"engine_args": {"hf_token": "abc", "max_tokens": 5}, "api_key": "x", "missing_eos": "keep", "eos_id": 3}
    assert redacted(settings) == {
        "engine_args": {"hf_token": "***", "max_tokens": 5},
        "api_key": "***",
        "missing_eos": "keep",
        "eos_id": 3,
    }


def test_versions_name_what_a_result_depends_on():
    assert {"python", "torch", "ray", "transformers"} <= versions().keys()


def test_commit_is_of_the_repository_that_tracks_the_folder(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package, installed = tmp_path / "package", tmp_path / "venv"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    git("init")
    git("add", "package")
    git("commit", "-m", "one")
    clean = git_commit(package)
    assert clean is not None and len(clean) == 12
    (package / "__init__.py").write_text("x = 1\n")
    assert git_commit(package) == f"{clean}-dirty"
    assert git_commit(installed) is None
