"""Turn Ctrl-C, SIGTERM and the end of the terminal into a request to stop, which a long run checks between its steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """The end of a run that stopped early on request, with everything saved. `signum` is the signal; the message says how to go on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """A request to stop: false until a signal arrives, then true, with the signal's number in `signum`."""

    def __init__(self) -> None:
        self.signum = 0

    def __bool__(self) -> bool:
        return self.signum != 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self:
            self.signum = signum
        elif signum != signal.SIGHUP:  # the second signal interrupts at once, but a terminal that ends may say so twice
            raise KeyboardInterrupt


def raise_if_stopped(stop: StopRequest | None, message: str) -> None:
    """Raise `Stopped` with this `message` after a stop request."""
    if stop:
        raise Stopped(message, stop.signum)


@contextlib.contextmanager
def stopped_with(message: str) -> Iterator[None]:
    """Give a `Stopped` that the block raises this `message`."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(message, stopped.signum) from None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Yield a request that the first SIGINT, SIGTERM or SIGHUP within the block sets without an interruption; a second one interrupts.

    A signal that the process ignores, as nohup says of SIGHUP and a shell of SIGINT in the background, stays ignored. Outside
    the main thread, where Python allows no handlers, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    each = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [number for number in each if signal.getsignal(number) != signal.SIG_IGN]
    handlers = [signal.signal(number, request._handle) for number in signals]
    try:
        yield request
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
