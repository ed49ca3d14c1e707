# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What code a run was made with: versions of libraries, and commits."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path


_LIBRARIES = ("luffy-trl", "trl", "transformers", "torch", "datasets", "tokenizers", "accelerate")


def library_versions(further: tuple[str, ...] = ()) -> dict[str, str]:
    """
    Versions of the libraries that decide what a run does. That of luffy-trl names its commit if it is not a release.
    """
    versions = {name: version(name) for name in (*_LIBRARIES, *further)}
    if commit := _package_commit():
        versions["luffy-trl"] += f", commit {commit}"
    return versions


def commit_of_run() -> str | None:
    """
    The commit of the git repository that the run was started in, the user's code, and whether tracked files differ
    from it; without an address. `None` outside of a repository.
    """
    return _commit(Path.cwd())


def _package_commit() -> str | None:
    """The commit of this package, where it was installed from a repository or runs from a clone."""
    try:
        installed_from = json.loads(distribution("luffy-trl").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        installed_from = {}
    if commit := installed_from.get("vcs_info", {}).get("commit_id"):
        return commit
    file = Path(__file__)
    # A package in the `.venv` of a project lies in its repository, but the commit is not that of the package.
    is_tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None
    return _commit(file.parent) if is_tracked else None


def _commit(folder: Path) -> str | None:
    commit = _git(folder, "rev-parse", "HEAD")
    if commit and _git(folder, "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes that are not committed"
    return commit


def _git(folder: Path, *args: str) -> str | None:
    try:
        result = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return result.stdout.strip() if result.returncode == 0 else None
