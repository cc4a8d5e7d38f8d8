"""Ctrl-C and SIGTERM end a command, and never in the middle of a file that somebody else's class is reading."""

import signal
import zipfile

import numpy as np
import pytest

from gradlens.errors import Stopped
from gradlens.interruption import stoppable, to_the_end

SIGNALS = [signal.SIGINT, signal.SIGTERM]
DONE: list[str] = []


def going(*steps):
    """Goes through the steps, of which numbers are signals, in a block that is gone through to its end."""
    with to_the_end():
        for step in steps:
            if isinstance(step, int):
                signal.raise_signal(step)
            elif isinstance(step, Exception):
                raise step
            else:
                DONE.append(step)


def heard(*steps):
    """The signal that ended these steps, and those that were done."""
    DONE.clear()
    with pytest.raises(Stopped) as stopped, stoppable():
        going(*steps)
    return stopped.value.args[0], list(DONE)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_block_and_the_handlers_are_restored(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as stopped, stoppable():
        signal.raise_signal(number)
    assert stopped.value.args == (number,)
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_gone_through_to_its_end_ends_before_the_signal_is_heard(number):
    assert heard("first", number, "last") == (number, ["first", "last"])


def test_a_second_signal_is_heard_at_once():
    assert heard(signal.SIGTERM, "the first waits", signal.SIGINT, "never") == (signal.SIGINT, ["the first waits"])


def test_a_signal_is_heard_also_where_the_block_fails():
    assert heard(signal.SIGTERM, ValueError(), "never") == (signal.SIGTERM, [])


def test_a_signal_waits_for_the_outermost_block():
    def nested():
        with to_the_end():
            going(signal.SIGTERM, "inner")
            DONE.append("outer")

    DONE.clear()
    with pytest.raises(Stopped), stoppable():
        nested()
    assert DONE == ["inner", "outer"]


def test_nothing_waits_for_the_next_command():
    heard(signal.SIGTERM)
    with stoppable():
        going("all")
    assert DONE == ["all"]


@pytest.mark.parametrize("method", ["__init__", "__del__", "close"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_a_zip_file_leaves_nothing_half_built_and_is_not_lost(
    tmp_path, command, monkeypatch, number, method
):
    """Wherever it arrives, it is heard: an exception within `__del__` would be swallowed, and the command go on."""
    for client in range(20):
        np.savez(tmp_path / f"round_0_client_{client}.npz", w=np.ones((2, 2)))
    original, calls = getattr(zipfile.ZipFile, method), []

    def signaled(self, *given, **settings):
        calls.append(method)
        if len(calls) == 5:
            signal.raise_signal(number)
        return original(self, *given, **settings)

    monkeypatch.setattr(zipfile.ZipFile, method, signaled)
    status, out, err = command("ingest", tmp_path, "-o", tmp_path / "run")
    assert (status, out, err) == (128 + number, "", "gradlens: interrupted; nothing is left of the run\n")
    assert not (tmp_path / "run").exists()
