"""What signals do, before and after there is something to save."""

import signal
import sys
from types import SimpleNamespace

import pytest

from swiftkv_train.stopping import Stop, Stopped

ALONE = SimpleNamespace(num_processes=1)


def test_before_there_is_anything_to_save_a_signal_ends_at_once():
    with Stop().watching() as stop, pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    assert stop.status == 0


def test_afterwards_it_is_noted_for_the_next_check():
    with Stop().watching() as stop:
        stop.defer()
        stop.check(ALONE)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            stop.check(ALONE)
    assert stop.status == 130


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_another_signal_interrupts(first):
    with Stop().watching() as stop:
        stop.defer()
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)  # a scheduler may repeat itself
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.status == (130 if first == signal.SIGINT else 0)


def test_a_signal_to_another_process_stops_this_one():
    import torch

    others = SimpleNamespace(
        num_processes=2, device="cpu", gather=lambda tensor: torch.cat([tensor, torch.tensor([int(signal.SIGINT)])])
    )
    stop = Stop()
    with pytest.raises(Stopped):
        stop.check(others)
    assert stop.status == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_of_several_that_leaves_at_once_does_not_wait_for_the_others(monkeypatch, number):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", sys.exit)
    with Stop().watching() as stop, pytest.raises(SystemExit) as end, stop.not_alone():
        signal.raise_signal(number)
    assert end.value.code == 128 + number  # no success, at which its launcher would let the others run


def test_several_that_leave_together_end_as_they_say(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", lambda status: pytest.fail("left alone"))
    with Stop().watching() as stop, stop.not_alone():
        stop.defer()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.check(ALONE)
    assert stop.status == 0


def test_the_handlers_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop().watching():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
