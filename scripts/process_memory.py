"""Memory of a process, and of the fresh ones in which the benchmarks measure it."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def resident(name: str = "VmHWM") -> float:
    """Resident memory of this process in MiB: its peak, or with ``VmRSS`` what it has now.

    Not ``ru_maxrss``, which a child inherits from its larger parent.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def printed_by(script: str, words: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """The number that a script prints last, in a process of its own."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    return float(done.stdout.split()[-1])
