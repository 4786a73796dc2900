"""No adapter stays registered from one test to the next."""

import pytest


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    # Not imported above: the suite's type checker hooks in after the first conftests are read.
    from flowtracer_plugin.attention import adapter

    monkeypatch.setattr(adapter, "_registered", [])
