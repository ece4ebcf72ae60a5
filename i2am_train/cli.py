"""The ``i2am`` program: picks a command and runs its module.

Standard library only, so that it answers at once. A command's module is run as ``__main__`` instead
of being called: Lightning starts the other processes of a distributed run by that module's name,
and would lose the command otherwise.
"""

from __future__ import annotations

import errno
import os
import runpy
import select
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "train": "train a model from a checkpoint, with or without attention losses",
    "evaluate": "judge a checkpoint on held-out samples: attention scores and image quality",
    "ablate": "train and judge arms x seeds from one checkpoint, and compare them",
    "explain": "draw every attribution map of a sample, and a page to explore them",
    "detect": "find painted objects from attention alone, and compare with detectors on COCO",
    "report": "make the paper's tables and figures from the folders of finished commands",
    "export": "write a model as a pipeline of diffusers with a model card, for the hub",
    "init": "make a model to train from Stable Diffusion 1.5 and an image encoder",
    "dashboard": "make a workspace and a report of the runs in Weights & Biases",
    "data": "make the embedded dataset, derive what a dataset lacks, or check one",
}
BAD_INPUT, INTERRUPTED = 2, 130
OUTPUT_CLOSED = 141
"""Exit status of a program whose reader went away, as the shell has it: 128 + SIGPIPE."""

HELP = """\
usage: i2am COMMAND [name=value ...]

Train and judge the attention of image-to-image diffusion models.

commands:
{commands}

examples:
  i2am data make
  i2am train experiment=refined seed=1
  i2am evaluate checkpoint=runs/refined-seed1
  i2am ablate arms=[base,baseline,refined] seeds=[0,1,2]
  i2am explain checkpoint=tiny sample=17
  i2am detect root=data/coco pipeline=Fantasy-Studio/Paint-by-Example
  i2am report explained=[runs/explain-tiny-test17-paired]
  i2am export checkpoint=runs/refined-seed1 output=exported/refined
  i2am init unet=v1-5-pruned.safetensors encoder=facebook/dinov2-giant output=models/start
  i2am dashboard group=ablation

`i2am COMMAND --help` lists the options of a command; `i2am --version` prints the version."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``i2am`` with the given arguments (``sys.argv`` where None)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    try:
        try:
            _answer(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.exit(OUTPUT_CLOSED)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _discard_output()  # all other files have names, and are the commands' own affair
        print("i2am: Standard output cannot be written: the disk is full.", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:  # before the command itself takes the signal
        print("i2am: SIGINT received: nothing was begun.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _answer(words: list[str]) -> None:
    command = words[0] if words else "--help"
    if command in ("--help", "-h", "help"):
        print(_help())
    elif command == "--version":
        print(_version())
    elif command in COMMANDS:
        run_command(command, words[1:])
    else:
        print(f"i2am: {_unknown(command)}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _discard_output() -> None:
    """What is still printed goes nowhere, at the interpreter's end, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_is_closed() -> bool:
    """Whether it was standard output that broke (``i2am ... | head``); nothing more goes there then, and no word."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not watch.poll(0):
        return False
    _discard_output()
    return True


def _open_closed_streams() -> None:
    """Standard streams that were closed (``>&-``) lead nowhere: files opened later would get their numbers, and
    prints would land in them.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, mode))


def run_command(command: str, words: Sequence[str]) -> None:
    """Run a command's module as ``__main__`` with the given words as its arguments."""
    sys.argv = [f"i2am {command}", *words]
    runpy.run_module(f"i2am_train.workflows.{command}", run_name="__main__", alter_sys=True)


def _help() -> str:
    return HELP.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()))


def _version() -> str:
    try:
        return f"i2am-train {version('i2am-train')}"
    except PackageNotFoundError:
        return "i2am-train (not installed)"


def _unknown(command: str) -> str:
    near = get_close_matches(command.lower(), COMMANDS, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(COMMANDS)}."
    return f"There is no command '{command}'. {hint}"
