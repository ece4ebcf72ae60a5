"""From a command line to a command: help, Hydra, typed options, and errors as one paragraph.

A command is a name and a path to its workflow (``config.commands``). Only the workflow imports what costs time, so
help and bad options are answered at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from textwrap import dedent
from typing import Any, NoReturn

from i2am_train.config.build import option_names, shortened, unknown_option
from i2am_train.config.commands import COMMANDS
from i2am_train.config.documentation import help_text
from i2am_train.config.locations import conf_folder
from i2am_train.doors import allow_named
from i2am_train.entry.faults import as_user_error
from i2am_train.entry.stopping import sentence, stopped_by_signals
from i2am_train.errors import CommandStopped, ConfigError
from i2am_train.processes import first_process
from i2am_train.quiet import quiet_libraries
from i2am_train.redaction import without_secrets

FAILED_CHECK = 1
"""Exit status of a command that worked and found the input wanting (``i2am data check``)."""
BAD_INPUT = 2
"""Exit status for input that the user can put right."""

Run = Callable[[Any], int | None]

HELP_FLAGS = ("--help", "-h")
DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "I2AM_DEBUG"

DASHES = ("-", "–", "—")
"""What flags begin with, also as word processors write it."""
MULTIRUN_FLAGS = ("-m", "--multirun")
HYDRA_FLAGS = (
    *("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--run", "-r", *MULTIRUN_FLAGS),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--shell-completion", "-sc"),
)
"""Those of Hydra's flags that are offered; others speak of Hydra itself, and one unpickles a file."""
VALUED_FLAGS = {flag for flag in HYDRA_FLAGS if flag.startswith(("--c", "-c", "--p", "-p", "--i", "-i"))}
"""Those that a value follows."""
PLAIN_NAME = re.compile(r"(?!hydra\b)\w[\w.]*")
"""Name of an option, without the signs by which Hydra adds and deletes some."""
MISSING_FILE = re.compile(
    r"Could not find '(?P<file>[^']+)'\s+"
    r"Available options in '(?P<group>[^']+)':(?P<choices>.*?)Config",
    re.DOTALL,
)
"""Hydra's message for a group that has no such file."""

WORKER_TRACEBACK = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]+: ", re.DOTALL
)
"""What torch puts before the message of an error that was raised in a process that reads samples."""


def execute(command: str, words: Sequence[str], run: Run | None = None) -> NoReturn:
    """Run a command and exit.

    Args:
        command: key of ``config.commands.COMMANDS``, and name of the file in ``conf/``.
        words: its options, as typed.
        run: takes the command's options and returns an exit status, None for success; None: the command's workflow.
    """
    if any(flag in words for flag in HELP_FLAGS):
        print(command_help(command))
        sys.exit(0)
    if DEBUG_FLAG in words:
        os.environ[DEBUG_VARIABLE] = "1"
    given = [word for word in words if word != DEBUG_FLAG]
    with errors_as_text(command), stopped_by_signals():
        sys.exit(run_with_hydra(command, given, run))
    raise AssertionError("unreachable: sys.exit raises")


@contextmanager
def errors_as_text(command: str = "") -> Iterator[None]:
    """Print an error that the user can put right as one paragraph and exit with status 2.

    With ``--debug`` or I2AM_DEBUG=1 the error goes on instead, with its traceback. A signal that stopped the command is
    said, too.
    """
    try:
        yield
    except CommandStopped as stop:
        _say(sentence(command, stop))
        sys.exit(stop.status)
    except KeyboardInterrupt:  # from a library that handles the signal itself
        _say(sentence(command, CommandStopped(signal.SIGINT)))
        sys.exit(CommandStopped(signal.SIGINT).status)
    except Exception as error:
        told = as_user_error(error)
        if told is None or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        _say(without_secrets(WORKER_TRACEBACK.sub("", str(told)).strip()))
        sys.exit(told.status)


def _say(text: str) -> None:
    """One paragraph on standard error. The other processes of a distributed run end the same way: one is enough."""
    if first_process():
        print(f"i2am: {text}", file=sys.stderr)


def command_help(command: str) -> str:
    """The ``--help`` of a command: its options with defaults, grouped, and examples."""
    usage = f"i2am {command.replace('_', ' ')} [name=value ...]"
    return help_text(command, usage, _indented(COMMANDS[command].examples))


def run_with_hydra(command: str, words: Sequence[str], run: Run | None = None) -> int:
    """Compose the options, check them and run; the exit status.

    Raises:
        ConfigError: an option cannot be read, does not exist or has an impossible value.
        I2AMError: what the command itself refuses.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from i2am_train.config.store import register_schemas, with_own_experiment
    from i2am_train.config.words import as_typed

    words = _checked(command, words)
    allow_named(words)
    sweep = any(word in MULTIRUN_FLAGS for word in words)
    register_schemas()
    # Hydra would print errors itself, with its own advice, and exit with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    task = _Task(command, run or workflow(command), sys.argv)
    decorate = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=command)
    try:
        # Hydra reads the program's words. The command itself sees those that were typed (`_Task`).
        known = with_own_experiment(command, words, sweep=sweep)
        sys.argv = [f"i2am {command}", *as_typed(command, known, sweep=sweep)]
        decorate(task)()
    except (HydraException, OmegaConfBaseException) as error:
        if task.entered:
            raise
        raise ConfigError(readable(error, command)) from error
    finally:
        sys.argv = task.typed
    return task.status


def workflow(command: str) -> Run:
    """What a command runs, imported when it is called: that takes seconds, which help and bad options need not wait."""
    module, _, function = COMMANDS[command].workflow.partition(":")

    def run(config: Any) -> int | None:
        status: int | None = getattr(import_module(f"i2am_train.workflows.{module}"), function)(config)
        return status

    return run


class _Task:
    """What Hydra calls with the composed options; remembers the exit status."""

    def __init__(self, command: str, run: Run, typed: list[str]) -> None:
        self.command = command
        self.run = run
        self.typed = typed
        self.entered = False
        self.status = 0
        # Hydra finds the module of a task by these.
        self.__module__ = __name__
        self.__name__ = self.__qualname__ = "run"

    def __call__(self, composed: Any) -> None:
        from i2am_train.config.store import to_dataclass

        # Here, and not only around Hydra: it announces every exception that passes through it.
        with errors_as_text(self.command):
            config = to_dataclass(self.command, composed)
            _refuse_distributed_sweep(config)
            self.entered = True
            quiet_libraries()
            sys.argv = self.typed  # Lightning starts the other processes of a distributed run with these
            self.status = self.run(config) or 0


def readable(error: Exception, command: str) -> str:
    """One paragraph for an error of Hydra or OmegaConf; names what is nearest to a misspelling."""
    from hydra.errors import OverrideParseException

    text = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_option(match[1], _known_options(command))
    if match := MISSING_FILE.search(text):
        choices = ", ".join(match["choices"].split())
        own = ", or the path of a YAML file" if match["group"] == "experiment" else ""
        name = match["file"].removesuffix(".yaml")
        return f"There is no file conf/{name}.yaml. {match['group']} can be {choices}{own}."
    if isinstance(error, OverrideParseException):
        word = str(error.override)
        name, equals, _ = word.partition("=")
        if equals and PLAIN_NAME.fullmatch(name) and name not in _known_options(command):
            return unknown_option(name, _known_options(command))
        return (
            f"The option '{shortened(word)}' cannot be read. Options are written name=value, lists name=[1,2]; "
            "quotation marks and brackets are closed, and a text with commas in a list is quoted: "
            "'name=[\"a, b\"]'."
        )
    return " ".join(str(error).split())


def _known_options(command: str) -> list[str]:
    return ["experiment", *option_names(COMMANDS[command].options)]


def _checked(command: str, words: Sequence[str]) -> list[str]:
    """The words, flags last. Refuses flags that Hydra does not have, or has for itself; it would answer with all of
    its own.
    """
    from argparse import ArgumentError

    from hydra._internal.utils import get_args_parser

    for word in words:
        flag = word.split("=")[0]
        # Not abbreviated ones either: "--experiment" would be "--experimental-rerun".
        if word.startswith(DASHES) and flag not in HYDRA_FLAGS:
            name = flag.lstrip("".join(DASHES)).replace("-", "_")
            known = _known_options(command)
            hint = f"Write {name}=VALUE." if name in known else unknown_option(name, known)
            raise ConfigError(f"There is no flag '{shortened(word)}'; options have no dashes. {hint}")
    parser = get_args_parser()
    parser.exit_on_error = False
    ordered = _flags_last(words)
    try:
        parser.parse_known_args(ordered)
    except ArgumentError as error:
        raise ConfigError(f"A flag is not possible: {error}. See --help.") from error
    return ordered


def _flags_last(words: Sequence[str]) -> list[str]:
    """The words with flags and their values behind the options: Hydra wants all options in a row.

    >>> _flags_last(["seed=0,1", "-m", "--cfg", "job", "name=x"])
    ['seed=0,1', 'name=x', '-m', '--cfg', 'job']
    """
    options: list[str] = []
    flags: list[str] = []
    waiting = False
    for word in words:
        (flags if waiting or word.startswith(DASHES) else options).append(word)
        waiting = word in VALUED_FLAGS
    return [*options, *flags]


def _refuse_distributed_sweep(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    group = getattr(config, "trainer", config)
    if not getattr(group, "multi_process", False) or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    prefix = "" if group is config else "trainer."
    names = [name for name in ("devices", "num_nodes") if hasattr(group, name)]
    raise ConfigError(
        "A sweep (-m) cannot start jobs of several processes: Hydra's and Lightning's launchers do "
        f"not work together. Found {', '.join(f'{prefix}{n}={getattr(group, n)}' for n in names)}. "
        "Set each to 1, or start the jobs one by one in a shell loop."
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in dedent(text).strip().splitlines())
