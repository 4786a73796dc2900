"""What all tests of training share: one policy, and no warnings about experiments."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """The folder of a tiny random policy."""
    # Not imported above: the suite's type checker hooks in after the first conftests are read.
    from tests.grpo.worker import save_policy

    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
