# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at bad moments."""

import gc
import os
import signal
import threading
import time

import pytest

from r1jax.cli import interrupt

WAIT = 5.0  # seconds, far more than it takes


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

    before = signal.getsignal(signal.SIGINT)
    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            doing(gc.collect)
    finally:
        gc.callbacks.remove(callback)
    assert pressed
    assert signal.getsignal(signal.SIGINT) is before


def test_elsewhere_it_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        doing(press)


def test_what_is_ignored_stays_ignored_and_threads_set_nothing():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.heard():
            press()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def inside():
        with interrupt.heard():
            seen.append(signal.getsignal(signal.SIGINT))

    seen = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
