"""Test what signals do to a long run."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtt_fast.runtime.interrupts import stop_request

pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_request(signum: signal.Signals) -> None:
    with stop_request() as stop:
        assert not stop
        signal.raise_signal(signum)
        assert stop
        assert stop.signum == signum
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_after_the_block_signals_do_what_they_did() -> None:
    """Check it for a notebook, whose Ctrl-C interrupts the next cell too."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(signum) for signum in signums]
    with pytest.raises(ValueError, match="in the block"), stop_request():
        raise ValueError("in the block")
    assert [signal.getsignal(signum) for signum in signums] == before


def test_a_thread_is_not_asked_to_stop() -> None:
    def request() -> bool:
        with stop_request() as stop:
            return bool(stop)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(request).result() is False


def test_a_terminal_that_ends_may_say_so_twice() -> None:
    """Be told by the shell, which tells its jobs, and by the system: the second signal does not interrupt what saves."""
    with stop_request() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.signum == signal.SIGHUP


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(signum: signal.Signals) -> None:
    """Ignore Ctrl-C as a script does in the background, where it is for another command, and with nohup the terminal's end."""
    signal.signal(signum, signal.SIG_IGN)
    with stop_request() as stop:
        signal.raise_signal(signum)
        assert not stop
    assert signal.getsignal(signum) == signal.SIG_IGN
