"""Which of a run's processes this is, before torch.distributed is set up.

Lightning starts the others itself, or torchrun, SLURM and the like start all at once.
"""

import os
import signal
import time
from pathlib import Path

from i2am_train.errors import RunFolderError

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables that number processes and machines: torchrun's, SLURM's and Lightning's."""
PATIENCE = 600.0
"""Seconds that a process waits for what the first one makes."""


def first_process() -> bool:
    """False in all processes of a run but one."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def ignore_interrupts(_number: int = 0) -> None:
    """For processes that read or draw for this one: Ctrl-C reaches them, too, and this one decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait_for(path: Path, seconds: float = PATIENCE) -> None:
    """Wait until the first process has made a file or folder.

    Raises:
        RunFolderError: it did not come.
    """
    ends = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > ends:
            raise RunFolderError(
                f"{path} did not appear within {seconds:g} seconds: the run's first process did not make it, or it "
                "lies on a disk that this machine does not share. Look at the first process's messages."
            )
        time.sleep(0.1)
