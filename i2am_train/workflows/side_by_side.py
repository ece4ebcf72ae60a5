"""Tasks in processes of their own, several at a time: for models that leave most of a GPU, or CPU cores, idle."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from i2am_train.entry import as_command
from i2am_train.environment import usable_cores
from i2am_train.errors import TaskFailedError

LAST_LINES = 12
"""Lines of the output of a task that failed which the error shows."""
PATIENCE = 60.0
"""Seconds that a task has to save its state when it is stopped."""


class _Running(NamedTuple):
    name: str
    slot: int
    process: BaseProcess


def side_by_side(tasks: Mapping[str, Callable[[], object]], at_once: int, logs: Path, command: str) -> None:
    """Run tasks, ``at_once`` at a time, each in a new process that writes its output to ``logs/<name>.log``.

    Each has its share of the CPU's threads, and one GPU: where there are several they take turns. If one fails, or
    this process is stopped, the others are told to stop (SIGTERM) and have ``PATIENCE`` to save what they have.

    Args:
        tasks: by name; picklable, since the processes begin anew.
        command: whose name stands in what a stopped task says.

    Raises:
        TaskFailedError: a task ended with an error; with its last lines.
    """
    waiting, running = list(tasks.items()), list[_Running]()
    logs.mkdir(parents=True, exist_ok=True)
    devices = _devices()
    try:
        with tqdm(total=len(tasks), desc="cells", unit="cell") as progress:
            while waiting or running:
                free = sorted(set(range(at_once)) - {one.slot for one in running})
                for slot in free[: len(waiting)]:
                    name, task = waiting.pop(0)
                    work = partial(_work, task, logs / f"{name}.log", command)
                    running.append(_Running(name, slot, _start(work, at_once, devices[slot % len(devices)])))
                    progress.set_postfix_str(", ".join(one.name for one in running))
                wait([one.process.sentinel for one in running])
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    _check(one, logs)
                    progress.update()
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.join(PATIENCE)
            if one.process.is_alive():
                one.process.kill()


def _devices() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each GPU alone; None where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(n) for n in range(torch.cuda.device_count())] if named is None else named.split(",")
    return [*filter(None, visible)] or [None]


def _start(work: Callable[[], None], at_once: int, device: str | None) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=work)
    threads = str(max(1, usable_cores() // at_once))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if device is not None:
        share["CUDA_VISIBLE_DEVICES"] = device
    with _environment(share):
        process.start()
    return process


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a new process finds in its environment before it imports anything."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(task: Callable[[], object], log: Path, command: str) -> None:
    """The whole life of one of the processes."""
    os.setpgrp()  # Ctrl-C in the terminal is for the first process, which then stops the others
    with log.open("a", buffering=1, encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        with as_command(command):
            task()


def _check(ended: _Running, logs: Path) -> None:
    if status := ended.process.exitcode:
        log = logs / f"{ended.name}.log"
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise TaskFailedError(
            f"{ended.name} {how}; the others were stopped, and the same command goes on from here. Its output is in "
            f"{log}, and ends with:\n{last}"
        )
