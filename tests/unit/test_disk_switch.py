"""A medium that failed is left alone for a while."""

import logging

import pytest

from kvkeep.tiers.disk_switch import Switch


def test_it_is_off_for_a_while_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each failure starts the pause anew; one warning an outage, and a note at its end."""
    caplog.set_level(logging.INFO, "kvkeep")
    now = 100.0
    switch = Switch("writing to x", 5.0, clock=lambda: now)
    assert (switch.is_off, switch.is_on_trial) == (False, False)

    switch.failed(OSError("full"))
    assert (switch.is_off, switch.is_on_trial) == (True, True)
    now = 104.9
    assert switch.is_off
    now = 105.0
    assert (switch.is_off, switch.is_on_trial) == (False, True)
    switch.failed(OSError("still full"))
    now = 109.0
    assert switch.is_off
    now = 111.0
    switch.worked()
    switch.worked()

    assert (switch.is_off, switch.is_on_trial, switch.num_outages) == (False, False, 1)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "writing to x: off for now, tried again every 5 s: full"),
        ("INFO", "writing to x: on again"),
    ]
    switch.failed(OSError("full again"))
    assert switch.num_outages == 2
    assert len(caplog.records) == 3
