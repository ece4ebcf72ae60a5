"""The command line: help at once, typed options to the command, errors as one paragraph."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from i2am_train import cli
from i2am_train.config.commands import COMMANDS
from i2am_train.config.data import DataCheckConfig
from i2am_train.config.training import TrainConfig
from i2am_train.entry import execute
from i2am_train.errors import CommandStopped, DataError

HEAVY = ("torch", "numpy", "lightning", "diffusers", "transformers", "cv2", "matplotlib")


pytestmark = pytest.mark.usefixtures("fresh_process")


def run_command(command: str, words: list[str], run: Any = lambda config: None) -> int:
    """Run a command in this process; its exit status."""
    with pytest.raises(SystemExit, match=r"\d+") as stop:
        execute(command, words, run)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`i2am`, `i2am --help`: every command in one line, and examples; each has its module."""
    cli.main([])
    bare = capsys.readouterr().out
    cli.main(["--help"])
    assert capsys.readouterr().out == bare
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} +\w", bare, re.MULTILINE)
        assert f"  i2am {command} " in bare


def test_an_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled command names the nearest one."""
    for word in ("trian", "TRAIN"):
        with pytest.raises(SystemExit, match="2"):
            cli.main([word])
        expected = f"i2am: There is no command '{word}'. Did you mean 'train'?\n"
        assert capsys.readouterr().err == expected


def test_a_command_gets_typed_options() -> None:
    """What is typed arrives as the schema's types; the command's return value is the status."""
    seen: list[TrainConfig] = []

    def run(config: TrainConfig) -> int:
        seen.append(config)
        return 1

    assert run_command("train", ["experiment=refined", "seed=4", "data.root=here"], run) == 1
    assert (seen[0].name, seen[0].seed, seen[0].data.root) == ("refined", 4, Path.cwd() / "here")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Hydra makes no outputs/ folder, writes no log, and stays in the current folder."""
    places: list[Path] = []
    assert run_command("train", [], lambda config: places.append(Path.cwd())) == 0
    assert places == [tmp_path]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.varian=1"], r"no option 'objective\.varian'\. Did you mean 'objective\.variant'\?"),
        (["optimisation=paper"], r"no option 'optimisation'\. Did you mean 'optimization'\?"),
        (["layer=2"], r"Did you mean 'attribution\.layer'\?"),
        (["objective.layer=2"], r"no option 'objective\.layer'\. Did you mean 'objective\.layers'\?"),
        (["objective.cwg=0.1"], r"no option 'objective\.cwg'\. Did you mean 'objective\.terms\.cwg'\?"),
        (["experiment=refind"], r"no file conf/experiment/refind\.yaml\. .* baseline, "),
        (["seed"], r"'seed' cannot be read\. Options are written name=value"),
        (["seed=[0,1"], r"'seed=\[0,1' cannot be read"),
        (["--seed", "1"], r"no flag '--seed'; options have no dashes\. Write seed=VALUE\."),
        (["--sed=1"], r"no flag '--sed=1'; .* Did you mean 'seed'\?"),
        (["--experiment", "refined"], r"no flag '--experiment'; .* Write experiment=VALUE\."),
        (["--experiment=refined"], r"no flag '--experiment=refined'; .* Write experiment=VALUE\."),
        (["–seed", "1"], r"no flag '–seed'; .* Write seed=VALUE\."),
        (["--experimental-rerun", "x.pickle"], r"no flag '--experimental-rerun'"),
        (["--version"], r"no flag '--version'"),
        (["-seed=1"], r"no flag '-seed=1'; .* Write seed=VALUE\."),
        (["--learning-rate", "1"], r"Did you mean 'optimization\.learning_rate'\?"),
        (["--cfg", "jobs"], r"A flag is not possible: .*invalid choice: 'jobs'"),
        (["--cfg"], r"A flag is not possible: .*expected one argument"),
        (["data.rot=a (1)"], r"no option 'data\.rot'\. Did you mean 'data\.root'\?"),
        (
            ["experiment=my file (1).yaml"],
            r"no experiment 'my file \(1\)\.yaml' \(.* is missing\)\. .*baseline, .*a YAML file",
        ),
        (["arms=[a,b"], r"no option 'arms'"),
        (["data.categories=[dresses,"], r"'data\.categories=\[dresses,' cannot be read"),
        (["attribution.delta=1"], r"attribution\.delta=1\.0 .* in \[0, 1\)"),
        (["experiment=demo"], r"no option 'arms'"),
        (["sampling.steps=${x}"], r"sampling\.steps: Interpolation key 'x' not found"),
        (["-m", "seed=0,1", "trainer=ddp"], r"sweep \(-m\) .* trainer\.devices=auto"),
    ],
)
def test_bad_input_is_one_paragraph(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake: status 2, one line on stderr that says what to do, no traceback, no run."""
    assert run_command("train", words, lambda config: pytest.fail("ran")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("i2am: ")
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err)


def refuse(config: TrainConfig) -> None:
    """A command that finds something wrong with its input."""
    raise DataError("The folder is empty. Fill it.")


def test_an_error_of_the_command_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command refuses looks the same as what the options refuse."""
    assert run_command("train", [], refuse) == 2
    assert capsys.readouterr().err == "i2am: The folder is empty. Fill it.\n"


class CutOff(Dataset[None]):
    """One sample, which cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> None:
        raise DataError("cloth/00001_00.jpg is cut off. Copy it again.")


def test_an_error_in_a_reading_process_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    """torch wraps a worker's error in its traceback; the user gets the sentence alone."""

    def read(config: TrainConfig) -> None:
        next(iter(DataLoader(CutOff(), num_workers=1)))

    assert run_command("train", [], read) == 2
    assert capsys.readouterr().err == "i2am: cloth/00001_00.jpg is cut off. Copy it again.\n"


def test_other_processes_of_a_distributed_run_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that fail the same way print one paragraph."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command("train", [], refuse) == 2
    assert capsys.readouterr().err == ""


def test_debugging_shows_the_traceback() -> None:
    """With --debug the error itself comes through."""
    with pytest.raises(DataError, match="Fill it"):
        execute("train", ["--debug"], refuse)
    os.environ.pop("I2AM_DEBUG")


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    """A bug is not dressed up as bad input."""

    def fail(config: TrainConfig) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        execute("train", [], fail)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_a_sentence(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    """What was received, and what continues; nothing that handles errors on the way swallows it."""

    def wait(config: Any) -> None:
        with suppress(Exception):
            os.kill(os.getpid(), number)
            time.sleep(10)

    before = signal.getsignal(number)
    assert run_command("train", [], wait) == 128 + number
    sentence = capsys.readouterr().err
    assert sentence == (
        f"i2am: {number.name} received: the command was stopped. The same command goes on from the last checkpoint.\n"
    )
    assert run_command("report", [], wait) == 128 + number
    assert "starts anew; nothing that was there before was changed" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_library_may_have_taken_the_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    """What it makes of it ends the command in the same way."""

    def interrupt(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    assert run_command("evaluate", ["checkpoint=tiny"], interrupt) == 130
    assert "goes on with the batches that are not there yet" in capsys.readouterr().err


def test_a_signal_amid_a_library_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the library's own clean-up fails over it, as OmegaConf's does."""

    def stopped(config: TrainConfig) -> None:
        try:
            raise CommandStopped(signal.SIGTERM)
        except CommandStopped:
            raise AttributeError("half-way") from None

    assert run_command("evaluate", ["checkpoint=tiny"], stopped) == 143
    said = capsys.readouterr().err
    assert said.startswith("i2am: SIGTERM received: the command was stopped.")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "paragraph"),
    [
        (OSError(errno.ENOSPC, "", "/a/b"), "/a/b cannot be used: no space left on device. Make room"),
        (OSError(errno.ENOSPC, ""), "A file cannot be used: no space left on device. Make room"),
        (OSError(errno.EROFS, "", "/a"), "/a cannot be used: read-only file system. Give another"),
        (OSError(errno.EACCES, "", "/a"), "/a cannot be used: permission denied. Give another"),
        (OSError(errno.ELOOP, "", "/a"), "too many levels of symbolic links. Links in that path"),
        (OSError(errno.ENAMETOOLONG, "", "/a"), "file name too long. A name in that path"),
        (OSError(errno.ENOTDIR, "", "/a"), "not a directory. A part of that path is a file"),
        (OSError(errno.EMFILE, ""), "too many open files. Raise the limit"),
        (RuntimeError("Symlink loop from '/a'"), "Links in that path lead in a circle"),
        (
            RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "),
            "A process that helps this one was killed (Killed), most often by the system because memory",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 17, 18) exited unexpectedly"),
            "A process that helps this one was killed, most often",
        ),
        (BrokenProcessPool("terminated abruptly"), "A process that helps this one was killed"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "no space left on device. Make room",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_faults_of_the_machine_are_said(error: Exception, paragraph: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever raises them: status 2 and one paragraph."""

    def fail(config: DataCheckConfig) -> None:
        raise error

    assert run_command("data_check", ["root=here"], fail) == 2
    said = capsys.readouterr().err
    assert said.startswith("i2am: ")
    assert said.count("\n") == 1
    assert paragraph in said


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "", "/a"),
        FileExistsError(errno.EEXIST, "", "/a"),
        OSError(errno.EBADF, ""),
        PermissionError(errno.EPERM, ""),  # of a system call that has no path
        BrokenPipeError(errno.EPIPE, ""),
        OSError("in words only"),
    ],
    ids=str,
)
def test_errors_of_the_system_that_may_be_the_programs_keep_their_traceback(error: OSError) -> None:
    """A file that is missing where we left it is our own fault."""

    def fail(config: DataCheckConfig) -> None:
        raise error

    with pytest.raises(type(error)):
        execute("data_check", ["root=here"], fail)


def closed(redirection: str, words: str = "--help") -> subprocess.CompletedProcess[str]:
    """The program under a shell that does something to its standard output."""
    line = f"{sys.executable} -m i2am_train {words} {redirection}"
    command = ["bash", "-c", line]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("words", ["--help", "data make --help", "train --cfg job"])
def test_a_reader_that_goes_away_ends_it_quietly(words: str) -> None:
    """`i2am ... | head` is no error, and a closed output is none either."""
    piped = closed("| (exec <&-; sleep 2); exit ${PIPESTATUS[0]}", words)
    assert (piped.returncode, piped.stderr) == (cli.OUTPUT_CLOSED, "")
    shut = closed(">&-", words)
    assert (shut.returncode, shut.stderr) == (0, "")


def test_an_output_that_cannot_be_written_is_said() -> None:
    full = closed("> /dev/full")
    assert (full.returncode, full.stderr) == (
        2, "i2am: Standard output cannot be written: the disk is full.\n",
    )  # fmt: skip


def test_data_has_five_sub_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`i2am data` explains itself, and a sub-command that does not exist names the nearest one, or all four."""
    cli.main(["data"])
    assert "make|derive|check|cache" in capsys.readouterr().out
    for word, hint in {"chek": "Did you mean 'check'?", "show": "There are make, derive, match, check, cache."}.items():
        with pytest.raises(SystemExit, match="2"):
            cli.main(["data", word])
        expected = f"i2am: There is no command 'i2am data {word}'. {hint}\n"
        assert capsys.readouterr().err == expected


LIGHT = (
    "--help",
    "train --help",
    "data make --help",
    *(f"{command} --cfg job" for command in ("train", "evaluate", "ablate", "explain", "report", "dashboard")),
)
LIGHT_PROGRAM = """
import io, sys
from contextlib import redirect_stdout
from hydra.core.global_hydra import GlobalHydra
from i2am_train.cli import main

for words in sys.argv[2:]:
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            main(words.split())
        except SystemExit as stop:
            assert not stop.code, stop.code
    GlobalHydra.instance().clear()
    heavy = [name for name in sys.argv[1].split() if name in sys.modules]
    print(words, len(printed.getvalue().splitlines()) > 3, heavy)
"""


def test_help_and_composition_load_nothing_heavy() -> None:
    """They answer in well under a second because no numeric package is imported."""
    command = [sys.executable, "-c", LIGHT_PROGRAM, " ".join(HEAVY), *LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{words} True []" for words in LIGHT]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_workflow(command: str) -> None:
    """The function that it names exists and takes the options."""
    module, _, function = COMMANDS[command].workflow.partition(":")
    run = getattr(import_module(f"i2am_train.workflows.{module}"), function)
    (config,) = get_type_hints(run).keys() - {"return"}
    assert get_type_hints(run)[config] is COMMANDS[command].options


def test_other_processes_are_started_with_the_command() -> None:
    """Lightning starts them as `sys.argv`, or as the module of `__main__`: both are the command as it was typed."""
    seen: list[list[str]] = []
    sys.argv = ["i2am", "train", "name=a (1)"]
    assert run_command("train", ["name=a-(1)"], lambda config: seen.append(sys.argv)) == 0
    assert seen == [["i2am", "train", "name=a (1)"]]
