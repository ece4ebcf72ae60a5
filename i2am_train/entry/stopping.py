"""What Ctrl-C and SIGTERM do to a command: it ends with one sentence, and status 130 or 143.

While a training takes its steps ``callbacks.interruption`` has these signals, and saves first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from i2am_train.config.commands import COMMANDS
from i2am_train.errors import CommandStopped

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Meanwhile they raise ``CommandStopped``, unless whoever started this process had them ignored (``nohup``)."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    ours = threading.current_thread() is threading.main_thread()  # others cannot
    for number, handler in before.items():
        if ours and handler != signal.SIG_IGN:
            signal.signal(number, _Stop(os.getpid()))
    try:
        yield
    finally:
        for number, handler in before.items():
            if ours:
                signal.signal(number, handler)


class _Stop:
    """The handler of the process that set it; its copies, which read samples, inherit it."""

    def __init__(self, process: int) -> None:
        self.process = process

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            raise CommandStopped(number)
        if number != signal.SIGINT:  # Ctrl-C reaches readers, too, and the process that they serve ends them
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def sentence(command: str, stop: CommandStopped) -> str:
    """What was received, and what the same command will do."""
    goes_on = COMMANDS[command].goes_on if command else ""
    if goes_on:
        return f"{stop} The same command goes on {goes_on}."
    return f"{stop} The same command starts anew; nothing that was there before was changed."
