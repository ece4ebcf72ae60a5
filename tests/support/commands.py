"""Commands, in this process and in processes of their own, and the page that one writes.

Those are forks of a server that has imported the product: an import takes ten seconds.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from i2am_train.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["i2am_train.workflows.train", "i2am_train.workflows.evaluate"])


def _run(words: Sequence[str], log: Path, environment: Mapping[str, str], threads: int) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(stream, number)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    # Readers are children of the command, as in a program, and end with it; a fork of the server would start its own.
    multiprocessing.set_start_method("fork", force=True)
    main(words)


def exit_status(command: str, words: Sequence[str]) -> int:
    """The exit status of a command, run in this process; an error that it does not say is raised."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["i2am"])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        with pytest.raises(SystemExit, match=r"\d*") as stop:
            main([*command.split(), *words])
    return int(stop.value.code or 0)


def page_data(folder: Path) -> dict[str, Any]:
    """What the script of ``explorer.html`` reads."""
    found = re.search(r'id="page-data">(.*?)</script>', (folder / "explorer.html").read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


class Command:
    """``i2am WORDS``, started at once; what it prints is kept in the file ``log``.

    It has as many threads as this process: sums in another order would change the last bits.
    """

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        what = (list(words), log, dict(environment or {}), torch.get_num_threads())
        self._process = SERVER.Process(target=_run, args=what)
        self._process.start()

    @property
    def process_id(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def finish(self, seconds: float = 300) -> tuple[int, str]:
        """Waits for the end; the exit status (negative: the signal that ended it), and all that was printed."""
        self._process.join(seconds)
        if not self.ended:
            self._process.kill()
            self._process.join()
            raise TimeoutError(self.log.read_text())
        assert self._process.exitcode is not None
        return self._process.exitcode, self.log.read_text() if self.log.exists() else ""

    def stop(self, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Sends a signal and waits for the end."""
        os.kill(self.process_id, number)
        return self.finish(120)
