"""What made a result: command line, code, package versions, machine and time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from i2am_train.redaction import without_secrets

REPORTED_PACKAGES = (
    "i2am-train", "torch", "torchvision", "lightning", "diffusers", "transformers", "torchmetrics", "clean-fid",
    "lpips", "stlpips-pytorch", "numpy", "opencv-python-headless", "hydra-core",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Command line, code, package versions and machine of this process."""
    return {
        "schema": 1,
        "command": command_line(),
        "git": git_state(),
        "versions": package_versions(),
        "machine": machine(),
    }


def command_line() -> str:
    """The command as it can be typed again."""
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


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, and GPU (None where torch sees none, or no torch)."""
    import psutil

    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
        "system": platform.platform(terse=True),
    }


def now() -> str:
    """The time as ISO 8601 text in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())
