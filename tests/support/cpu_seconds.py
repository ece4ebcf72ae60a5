"""A plugin that says where the tests' time goes: seconds of a core, with children.

make test PYTEST_ADDOPTS="-p tests.support.cpu_seconds"
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

PROCESSES: dict[str, float] = {}
"""Seconds of each worker, or of this process; importing and collecting are what its tests do not explain."""
TESTS: Counter[str] = Counter()
LAST = pytest.StashKey[float]()
"""What was spent when the last phase of a test ended."""


def spent() -> float:
    """Of this process and of those children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    now = spent()
    before = item.config.stash.get(LAST, now)
    item.config.stash[LAST] = now
    report: Any = yield
    report.cpu_seconds = now - before
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[LAST] = spent()


def pytest_runtest_logreport(report: Any) -> None:
    TESTS[report.nodeid] += getattr(report, "cpu_seconds", 0.0)


def pytest_sessionfinish(session: Any) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cpu_seconds"] = spent()
    elif not PROCESSES:
        PROCESSES["all"] = spent()


def pytest_testnodedown(node: Any) -> None:
    PROCESSES[node.gateway.id] = node.workeroutput["cpu_seconds"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    files: Counter[str] = Counter()
    for name, seconds in TESTS.items():
        files[name.partition("::")[0]] += seconds
    terminalreporter.section("seconds of a core")
    for counted in (PROCESSES, files, TESTS):
        for name, seconds in Counter(counted).most_common(40):
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line(f"{sum(counted.values()):8.1f}  in all\n")
