"""How much prefill goes between two steps, from what the device was measured to do."""

import pytest

from clo.gpu_worker.pacing import Pacing
from tests.fake_engine import FakeEngine, FakeTimer


class Device:
    """Hands out timers of work that is complete, or not yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine, self._monkeypatch = FakeEngine(), monkeypatch

    def took(self, seconds: float) -> FakeTimer:
        timer = FakeTimer(self._engine)
        timer.stop()
        self._monkeypatch.setattr("tests.fake_engine.SECONDS", seconds)
        return timer

    def busy(self) -> FakeTimer:
        timer = FakeTimer(self._engine)
        self._engine.launch()
        timer.stop()
        return timer


def test_each_prompt_gets_a_little_more_than_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device, pacing = Device(monkeypatch), Pacing(None, 1.0)
    assert pacing.between_steps(1) == 0.0, "nothing is known"
    pacing.launched(device.took(0.002), 600.0)
    pacing.look()
    assert pacing.between_steps(1) == 0.0
    pacing.launched_step(device.took(0.01))
    pacing.look()
    assert pacing.between_steps(1) == pytest.approx(0.01 * 300_000)
    assert pacing.between_steps(3) == pytest.approx(3 * 0.01 * 300_000)


def test_one_odd_measurement_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first unit compiles kernels."""
    device, pacing = Device(monkeypatch), Pacing(None, 1.0)
    for seconds in (5.0, 0.01, 0.01, 0.01, 0.011):
        pacing.launched(device.took(seconds), 1000.0)
        pacing.look()
        pacing.launched_step(device.took(seconds))
        pacing.look()
    assert pacing.between_steps(1) == pytest.approx(1000.0, rel=0.2)


def test_a_number_of_tokens_is_kept_whatever_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    device, pacing = Device(monkeypatch), Pacing(300, 7.0)
    pacing.launched(device.took(1.0), 5.0)
    pacing.launched_step(device.took(1.0))
    pacing.look()
    assert pacing.between_steps(1) == pacing.between_steps(9) == 2100.0


def test_what_is_ahead_of_the_device_is_limited_by_time_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    device, pacing = Device(monkeypatch), Pacing(None, 1.0)
    pacing.launched(device.took(0.01), 100.0)
    pacing.look()
    for flops, more in ((150.0, True), (100.0, True), (60.0, False)):
        pacing.launched(device.busy(), flops)
        assert pacing.more is more, "30 ms are 300 operations"
    device, fast = Device(monkeypatch), Pacing(None, 1.0)
    fast.launched(device.took(0.01), 1e9)
    fast.look()
    for number in range(8):
        assert fast.more, number
        fast.launched(device.busy(), 1.0)
    assert not fast.more
