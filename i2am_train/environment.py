"""The process of a command: what made its results, which of a run's processes it is, and what it may print.

Lightning starts the other processes of a run itself, or torchrun, SLURM and the like start all at once; which one this
is must be known before torch.distributed is set up. What is printed or kept holds no secret: ``data.cache`` may be
``s3://KEY:SECRET@host/bucket`` or ``https://host/folder?token=...``, and what stands there is for the client that opens
the address alone.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from i2am_train.errors import RunFolderError

REPORTED_PACKAGES = (
    "i2am-train", "torch", "torchvision", "lightning", "diffusers", "transformers", "torchmetrics", "clean-fid",
    "lpips", "stlpips-pytorch", "numpy", "opencv-python-headless", "hydra-core",
)  # fmt: skip
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables that number processes and machines: torchrun's, SLURM's and Lightning's."""
LIBRARY_REMARKS = (
    r".*Consider increasing the value of the `num_workers` argument.*",
    r".*does not have many workers.*",
    r".*is smaller than the logging interval.*",
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen networks, on purpose
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own use of torch
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    r".*You are using a CUDA device.*",
    r".*'set_vital' is deprecated.*",  # torchdata's own use of torch
    r"IProgress not found.*",  # in notebooks: bars are drawn as text all the same
)
"""What a user can do nothing about, each by its text; everything else still shows."""
_USER = re.compile(r"(?<=://)(?:[^\s/@'\"]*@|[^\s/@:'\"]*:(?!\d+(?:/|\s|$))[^\s'\"]*@)")
"""Name and password before a host; also a password with a slash in it, which no client would take."""
_VALUE = re.compile(r"(?<=[?&])([^\s=&#'\"]+)=[^\s&#'\"]*")
"""A name and its value behind the question mark."""
_ADDRESS = re.compile(r"\w://[^\s'\"]+")


# ---- what made a result --------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Command line, code, package versions and machine of this process.

    >>> list(provenance())
    ['schema', 'command', 'git', 'versions', 'machine']
    """
    return {
        "schema": 1,
        "command": command_line(),
        "git": git_state(),
        "versions": _package_versions(),
        "machine": machine(),
    }


def command_line() -> str:
    """The command as it can be typed again.

    >>> from unittest.mock import patch
    >>> with patch.object(sys, "argv", ["/usr/bin/i2am", "train", "name=a b", "data.cache=s3://me:pass@host/a"]):
    ...     command_line()
    "i2am train 'name=a b' data.cache=s3://***@host/a"
    """
    program, *words = sys.argv
    path = Path(program)
    name = "i2am" if path.parts[-2:] == ("i2am_train", "__main__.py") else path.name
    return without_secrets(" ".join([name, *map(shlex.quote, words)]))


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that runs, and whether it has local changes; None for a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, and GPU (None where torch sees none, or no torch).

    >>> machine()["cores"] > 0, list(machine())
    (True, ['cpu', 'cores', 'memory_gib', 'gpu', 'system'])
    """
    import psutil

    torch = sys.modules.get("torch")
    return {
        "cpu": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell.

    >>> usable_cores() > 0
    True
    """
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def now() -> str:
    """The time as ISO 8601 text in UTC, to the second.

    >>> len(now()), now()[-6:]
    (25, '+00:00')
    """
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- which of a run's processes -----------------------------------------------------------------------------------


def first_process() -> bool:
    """False in all processes of a run but one.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, {"LOCAL_RANK": "1"}):
    ...     first_process()
    False
    """
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def ignore_interrupts(_number: int = 0) -> None:
    """For processes that read for this one: Ctrl-C reaches them, too, and this one decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait_for(path: Path, seconds: float = 600.0) -> None:
    """Wait until the first process has made a file or folder, at most so many seconds.

    Raises:
        RunFolderError: it did not come.

    >>> wait_for(Path("/nowhere"), 0)
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: /nowhere did not appear within 0 seconds: ...
    """
    ends = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > ends:
            raise RunFolderError(
                f"{path} did not appear within {seconds:g} seconds: the run's first process did not make it, or it "
                "lies on a disk that this machine does not share. Look at the first process's messages."
            )
        time.sleep(0.1)


# ---- what may be printed and kept ---------------------------------------------------------------------------------


def quiet_libraries() -> None:
    """Silence diffusers, transformers below errors, and `LIBRARY_REMARKS`; call before they are imported.

    What diffusers calls an error is one that it also raises, or a file for which it finds another.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Pillow's remarks on broken EXIF entries that nobody asked for.
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    for text in LIBRARY_REMARKS:
        warnings.filterwarnings("ignore", text)


def without_secrets(text: str) -> str:
    """A text, in whose addresses names, passwords and the values behind a question mark are hidden.

    >>> without_secrets("data.cache=s3://me:pass@host:9000/a?token=b&c=d is missing")
    'data.cache=s3://***@host:9000/a?token=***&c=*** is missing'
    >>> without_secrets("https://host:80/a@b and what? a=b"), without_secrets("s3://bucket/folder")
    ('https://host:80/a@b and what? a=b', 's3://bucket/folder')
    """
    return _ADDRESS.sub(lambda found: _VALUE.sub(r"\1=***", _USER.sub("***@", found[0])), text)


def shown(value: Any) -> Any:
    """Plain nested values whose texts are :func:`without_secrets`.

    >>> shown({"cache": "https://token@host/a", "sizes": [1, 2]})
    {'cache': 'https://***@host/a', 'sizes': [1, 2]}
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {name: shown(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    return value
