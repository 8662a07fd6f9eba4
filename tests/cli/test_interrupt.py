# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at bad moments."""

import gc
import os
import signal
import sys
import threading
import time

import pytest

from r1jax.cli import interrupt

WAIT = 5.0  # seconds, far more than it takes


@pytest.fixture(autouse=True)
def python_hears_ctrl_c():
    """As in a terminal: what a shell runs in its background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def doing(first):
    """A program that does something and goes on for long enough to hear a signal sent again."""
    with interrupt.heard():
        first()
        waited()


def waited():
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        time.sleep(0.01)


def test_ctrl_c_inside_the_garbage_collector_is_not_lost():
    """As JAX's callback is when arrays are dropped: Python forgets what is raised there."""
    pressed = []

    def callback(phase, info):
        if phase == "start" and not pressed:
            pressed.append(phase)
            press()
            for _ in range(1000):
                pass  # the handler runs here

    before = sys.unraisablehook
    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            doing(gc.collect)
    finally:
        gc.callbacks.remove(callback)
    assert pressed
    assert sys.unraisablehook is before


def test_elsewhere_it_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        doing(press)


class Finalised:
    """Ctrl-C falls into its finaliser."""

    def __del__(self):
        press()
        for _ in range(1000):
            pass


def test_ctrl_c_inside_a_finaliser_is_not_lost():
    with pytest.raises(KeyboardInterrupt):
        doing(Finalised)


def test_other_errors_of_finalisers_are_told_as_ever(capsys, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    class Wrong:
        def __del__(self):
            raise ValueError

    with interrupt.heard():
        Wrong()
        hook = sys.unraisablehook
    assert told == [ValueError]
    assert sys.unraisablehook is not hook


def test_threads_set_nothing():
    def inside():
        with interrupt.heard():
            seen.append(sys.unraisablehook)

    seen, before = [], sys.unraisablehook
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
