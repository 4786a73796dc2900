import pytest

from flowtracer_plugin.attention import adapter


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(adapter, "_registered", [])
