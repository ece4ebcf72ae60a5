"""From a command line to a workflow: help, options, signals, and errors as one paragraph.

A command is a name and a path to its workflow (``config.commands``). Only the workflow imports what costs time, so
help and bad options are answered at once.

Ctrl-C and SIGTERM end a command with one sentence, and status 130 or 143; while a training takes its steps
``callbacks.interruption`` has these signals, and saves first. Faults of the machine are told from the program's own
here: only errors that no program can cause by itself are taken (a full disk, a folder that may not be written, a path
that cannot be, a process that the system killed). A missing file or a closed descriptor keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from i2am_train.config.commands import COMMANDS, command_help
from i2am_train.config.locations import conf_folder
from i2am_train.config.objective import TERMS
from i2am_train.config.options import option_names, shortened, unknown_option
from i2am_train.doors import allow_named
from i2am_train.environment import first_process, quiet_libraries, without_secrets
from i2am_train.errors import CommandStopped, ConfigError, I2AMError, OutputError, ProcessKilledError
from i2am_train.files import RUST_ERROR

FAILED_CHECK = 1
"""Exit status of a command that worked and found the input wanting (``i2am data check``)."""

Run = Callable[[Any], int | None]

HELP_FLAGS = ("--help", "-h")
DEBUG_FLAG, DEBUG_VARIABLE = "--debug", "I2AM_DEBUG"
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


def execute(command: str, words: Sequence[str], run: Run | None = None) -> NoReturn:
    """Run a command and exit.

    Args:
        command: key of ``config.commands.COMMANDS``.
        words: its options, as typed.
        run: takes the command's options and returns an exit status, None for success; None: the command's workflow.
    """
    if any(flag in words for flag in HELP_FLAGS):
        print(command_help(command))
        sys.exit(0)
    if DEBUG_FLAG in words:
        os.environ[DEBUG_VARIABLE] = "1"
    given = [word for word in words if word != DEBUG_FLAG]
    with as_command(command):
        sys.exit(_run_with_hydra(command, given, run or _workflow(command)))
    raise AssertionError("unreachable: sys.exit raises")


def _leave_the_other_processes() -> None:
    """Ends what a distributed run began: NCCL's threads may keep a process alive that has finished."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


# ---- options ------------------------------------------------------------------------------------------------------


def _run_with_hydra(command: str, words: Sequence[str], run: Run) -> int:
    """Compose the options, check them and run; the exit status.

    Raises:
        ConfigError: an option cannot be read, does not exist or has an impossible value.
        I2AMError: what the command itself refuses.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from i2am_train.config.store import as_typed, known_to_hydra, to_dataclass, with_own_experiment

    typed, entered, status = sys.argv, False, 0

    def task(composed: Any) -> None:
        nonlocal entered, status
        # Here, and not only around Hydra: it announces every exception that passes through it.
        with _errors_as_text(command):
            config = to_dataclass(command, composed)
            _refuse_distributed_sweep(config)
            entered = True
            quiet_libraries()
            sys.argv = typed  # Lightning starts the other processes of a distributed run with these
            status = run(config) or 0
            _leave_the_other_processes()

    words = _checked(command, words)
    allow_named(words)
    sweep = any(word in MULTIRUN_FLAGS for word in words)
    # Hydra would print errors itself, with its own advice, and exit with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    decorate = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=command)
    try:
        # Hydra reads the program's words. The command itself sees those that were typed.
        with known_to_hydra(command):
            known = with_own_experiment(command, words, sweep=sweep)
            sys.argv = [f"i2am {command}", *as_typed(command, known, sweep=sweep)]
            decorate(task)()
    except (HydraException, OmegaConfBaseException) as error:
        if entered:
            raise
        raise ConfigError(_readable(error, command)) from error
    finally:
        sys.argv = typed
    return status


def _workflow(command: str) -> Run:
    """What a command runs, imported when it is called: that takes seconds, which help and bad options need not wait."""

    def run(config: Any) -> int | None:
        module, _, function = COMMANDS[command].workflow.partition(":")
        status: int | None = getattr(import_module(f"i2am_train.workflows.{module}"), function)(config)
        return status

    return run


def _readable(error: Exception, command: str) -> str:
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
        word = str(error.override).removeprefix("++")  # which as_typed set
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
    names = ["experiment", *option_names(COMMANDS[command].options)]
    return names + [f"objective.terms.{term}" for term in TERMS if "objective.terms" in names]


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


# ---- signals ------------------------------------------------------------------------------------------------------


@contextmanager
def as_command(command: str) -> Iterator[None]:
    """Meanwhile this process ends as a command does: a signal or the user's error in one paragraph, and a status."""
    with _errors_as_text(command), stopped_by_signals():
        yield


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Meanwhile they raise ``CommandStopped``, unless whoever started this process had them ignored (``nohup``)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = threading.current_thread() is threading.main_thread()  # others cannot
    for number, handler in before.items():
        if ours and handler != signal.SIG_IGN:
            signal.signal(number, _stop_handler(os.getpid()))
    try:
        yield
    finally:
        for number, handler in before.items():
            if ours:
                signal.signal(number, handler)


def _stop_handler(process: int) -> Callable[[int, FrameType | None], None]:
    """The handler of the process that sets it; its copies, which read samples, inherit it."""

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise CommandStopped(number)
        if number != signal.SIGINT:  # Ctrl-C reaches readers, too, and the process that they serve ends them
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    return stop


def _sentence(command: str, stop: CommandStopped) -> str:
    """What was received, and what the same command will do."""
    goes_on = COMMANDS[command].goes_on
    if goes_on:
        return f"{stop} The same command goes on {goes_on}."
    return f"{stop} The same command starts anew; nothing that was there before was changed."


# ---- errors -------------------------------------------------------------------------------------------------------

_FULL = "Make room, or give a folder on another disk; the same command then goes on where it can."
_FORBIDDEN = "Give another folder (output=FOLDER), or the right to write there."
NEEDS_NO_PATH = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "Raise the limit of the size of files (ulimit -f), or give a folder on another disk.",
    errno.EROFS: _FORBIDDEN,
    errno.EIO: "The disk or its connection fails: look at the system's messages (dmesg).",
    errno.ESTALE: "The network disk was mounted anew meanwhile: give the same command again.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or lower the number of workers.",
    errno.ENFILE: "The whole machine has too many open files: end other programs, or lower the number of workers.",
}
"""What to do about errors that are the machine's wherever they come from."""
OF_A_PATH = {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: "A part of that path is a file. Give another folder.",
    errno.ELOOP: "Links in that path lead in a circle. Give a path without them.",
    errno.ENAMETOOLONG: "A name in that path is longer than the disk allows. Give a shorter one.",
}
"""The same where the error names a path."""
SAMPLES_ARRIVE = (
    str(Path("torch", "multiprocessing", "reductions.py")),
    str(Path("multiprocessing", "resource_sharer.py")),
)
"""Code that fetches tensors from the process that read them."""
SYMLINK_LOOP = re.compile(r"Symlink loop from (.+)")
"""What pathlib says instead of ELOOP."""
KILLED_READER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)
WORKER_TRACEBACK = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]+: ", re.DOTALL
)
"""What torch puts before the message of an error that was raised in a process that reads samples."""


@contextmanager
def _errors_as_text(command: str) -> Iterator[None]:
    """Print an error that the user can put right as one paragraph and exit with status 2.

    With ``--debug`` or I2AM_DEBUG=1 the error goes on instead, with its traceback. A signal that stopped the command is
    said, too.
    """
    try:
        yield
    except (CommandStopped, KeyboardInterrupt) as error:  # the second from a library that handles the signal itself
        _end_stopped(command, error)
    except Exception as error:
        told = _as_user_error(error)
        if told is None and (stop := _stop_behind(error)):
            _end_stopped(command, stop)
        if told is None or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        _say(without_secrets(WORKER_TRACEBACK.sub("", str(told)).strip()))
        sys.exit(told.status)


def _end_stopped(command: str, error: BaseException) -> NoReturn:
    stop = error if isinstance(error, CommandStopped) else CommandStopped(signal.SIGINT)
    _say(_sentence(command, stop))
    sys.exit(stop.status)


def _stop_behind(error: BaseException) -> BaseException | None:
    """The signal amid which an error came up: libraries that are stopped half-way (OmegaConf) fail to tidy up."""
    found = error.__context__
    while found is not None and not isinstance(found, (CommandStopped, KeyboardInterrupt)):
        found = found.__context__
    return found


def _say(text: str) -> None:
    """One paragraph on standard error. The other processes of a distributed run end the same way: one is enough."""
    if first_process():
        print(f"i2am: {text}", file=sys.stderr)


def _as_user_error(error: Exception) -> I2AMError | None:
    """What the user can be told of an error; None if it is the program's own."""
    if isinstance(error, I2AMError):
        return error
    if isinstance(error, BrokenProcessPool) or (isinstance(error, (OSError, EOFError)) and _is_of_a_reader(error)):
        return _killed("")
    if isinstance(error, OSError):
        return _refusal(error.errno, error.filename)
    if isinstance(error, RuntimeError):
        if found := SYMLINK_LOOP.search(str(error)):
            return _refusal(errno.ELOOP, found[1])
        if found := KILLED_READER.search(str(error)):
            return _killed(f" ({found[1]})" if found[1] else "")
    if found := RUST_ERROR.search(str(error)):
        return _refusal(int(found[1]), None)
    return None


def _is_of_a_reader(error: Exception) -> bool:
    """Whether a sample was to be taken over from a process that is gone: its file, socket or pipe is, too."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith(SAMPLES_ARRIVE) for frame, _ in frames)


def _refusal(number: int | None, path: object) -> OutputError | None:
    advice = NEEDS_NO_PATH.get(number or 0) or (OF_A_PATH.get(number or 0) if path else None)
    if advice is None or number is None:
        return None
    place = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else "A file"
    return OutputError(f"{place} cannot be used: {os.strerror(number).lower()}. {advice}")


def _killed(how: str) -> ProcessKilledError:
    return ProcessKilledError(
        f"A process that helps this one was killed{how}, most often by the system because memory, or shared memory "
        "(/dev/shm), ran out. Lower the number of workers (data.workers=0 reads in this process), or free memory; the "
        "same command then goes on where it can."
    )
