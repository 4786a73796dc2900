"""Troubles that end no run."""

import logging

import pytest

from flowtracer_plugin.trace.troubles import Troubles


def test_a_trouble_is_logged_once_and_then_counted(caplog):
    troubles = Troubles(logging.getLogger("a.run"))
    for step in range(250):
        with troubles.caught(f"no page of step {step}", kind="page"):
            raise OSError("no space left on device")
    first, hundredth = caplog.records
    assert first.getMessage().startswith("no page of step 0; the run goes on")
    assert "no space left on device" in str(first.exc_info[1])
    assert hundredth.getMessage() == "no page of step 99; this has happened 100 times"


def test_each_kind_of_trouble_is_logged(caplog):
    troubles = Troubles(logging.getLogger("a.run"))
    for message, error in (
        ("no page", OSError()),
        ("no page", KeyError()),
        ("no table", OSError()),
    ):
        for _ in range(3):
            troubles.add(message, error)
    assert len(caplog.records) == 3


def test_what_a_user_stops_is_no_trouble():
    with pytest.raises(KeyboardInterrupt), Troubles(logging.getLogger()).caught("no page"):
        raise KeyboardInterrupt
