"""The ``i2am`` program: picks a command. Standard library only, so that it answers at once."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

COMMANDS = {
    "train": "train a model from a checkpoint, with or without attention losses",
    "evaluate": "judge a checkpoint on held-out samples: attention scores and image quality",
    "ablate": "train and judge arms x seeds from one checkpoint, and compare them",
    "explain": "draw every attribution map of a sample, and a page to explore them",
    "faithful": "measure whether the attention is a cause of the image, layer by layer",
    "diagnose": "find the layers whose attention should be repaired, and how",
    "detect": "find painted objects from attention alone, and compare with detectors on COCO",
    "report": "make the paper's tables and figures from the folders of finished commands",
    "export": "write a model as a pipeline of diffusers with a model card, for the hub",
    "init": "make a model to train from Stable Diffusion 1.5 and an image encoder",
    "dashboard": "make a workspace and a report of the runs in Weights & Biases",
    "data": "make the embedded dataset, derive or match what a dataset lacks, or check one",
}
DATA_COMMANDS = {
    "make": "make a synthetic try-on dataset with exact correspondence, in VITON-HD layout",
    "derive": "make what a dataset lacks: masks and agnostic pictures from parsing maps and poses\n"
    "            (exit status 1 if a picture was refused)",
    "match": "find where pixels of worn garments lie on the flat ones, for data without correspondence\n"
    "            (exit status 1 if a sample was refused)",
    "check": "report everything that is wrong with a dataset folder\n"
    "            (exit status 1 if training would fail)",
    "cache": "encode a dataset by the frozen networks, once for all training runs",
}
"""What follows ``i2am data``."""
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
  i2am faithful checkpoint=runs/refined-seed1 samples=64
  i2am diagnose checkpoint=runs/baseline-seed1
  i2am detect root=data/coco pipeline=Fantasy-Studio/Paint-by-Example
  i2am report explained=[runs/explain-tiny-test17-paired]
  i2am export checkpoint=runs/refined-seed1 output=exported/refined
  i2am init unet=v1-5-pruned.safetensors encoder=facebook/dinov2-giant output=models/start
  i2am dashboard group=ablation

`i2am COMMAND --help` lists the options of a command; `i2am --version` prints the version."""
DATA_HELP = """\
usage: i2am data make|derive|check|cache [name=value ...]

{commands}

`i2am data make --help`, and likewise for the others, lists the options."""
HELP_FLAGS = ("--help", "-h", "help")


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
    command, *options = words or ["--help"]
    if command in HELP_FLAGS:
        print(HELP.format(commands=_listed(COMMANDS)))
    elif command == "--version":
        print(_version())
    elif command not in COMMANDS:
        _refuse(command, COMMANDS)
    elif command == "data" and (not options or options[0] in HELP_FLAGS):
        print(DATA_HELP.format(commands=_listed(DATA_COMMANDS)))
    elif command == "data" and options[0] not in DATA_COMMANDS:
        _refuse(f"i2am data {options[0]}", DATA_COMMANDS)
    elif command == "explain" and "--recipes" in options:
        import_module("i2am_train.workflows.recipes").print_recipes()
    else:
        name = f"data_{options.pop(0)}" if command == "data" else command
        import_module("i2am_train.entry").execute(name, options)


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


def _listed(commands: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:10}{text}" for name, text in commands.items())


def _version() -> str:
    try:
        return f"i2am-train {version('i2am-train')}"
    except PackageNotFoundError:
        return "i2am-train (not installed)"


def _refuse(command: str, known: Mapping[str, str]) -> NoReturn:
    near = get_close_matches(command.lower().rpartition(" ")[-1], known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(known)}."
    print(f"i2am: There is no command '{command}'. {hint}", file=sys.stderr)
    sys.exit(BAD_INPUT)
