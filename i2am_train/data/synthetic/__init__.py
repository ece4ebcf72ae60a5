"""The embedded try-on data as a folder in VITON-HD layout: :func:`make_dataset` (what is drawn: ``rendering``)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from i2am_train.data.layouts import GARMENT_ROLES, OPTIONAL_ROLES, PERSON_ROLES
from i2am_train.data.parsing import VITON_HD, write_labels
from i2am_train.data.picture_files import WRITING, encode_correspondence
from i2am_train.data.poses import openpose_json
from i2am_train.data.synthetic.rendering import SyntheticSample, render_annotations, render_sample, sample_name
from i2am_train.errors import DataError
from i2am_train.files import named_errors, write_text
from i2am_train.fingerprints import DESCRIPTION_FILE
from i2am_train.locks import staged
from i2am_train.types import GridSize, Role, Split

GENERATOR = "i2am_train.datasets.synthetic"
"""Its name in datasets on disk, which are known by it: it stays when modules move."""
GENERATOR_VERSION = 1
"""Raised whenever the same seed would draw another picture."""

FIRST_TEST_INDEX = 50_000
"""Index of the first test sample; training samples come before it."""

MAX_SAMPLES = 50_000

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""What ends a command."""

FOLDERS = (*PERSON_ROLES, *GARMENT_ROLES, *OPTIONAL_ROLES)
PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]


def _description(train: int, test: int, size: GridSize, seed: int, annotations: bool = False) -> dict[str, Any]:
    """The contents of ``dataset.json``: all that decides the files."""
    extra = {"annotations": True} if annotations else {}
    return {
        "generator": GENERATOR, "version": GENERATOR_VERSION, "seed": seed,
        "height": size.height, "width": size.width, "train": train, "test": test, **extra,
    }  # fmt: skip


def make_dataset(
    root: Path, train: int, test: int, size: GridSize, seed: int, *, annotations: bool = False,
    workers: int | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Write a dataset in VITON-HD layout; a complete one of the same description is kept as it is.

    The files go to ``<root>.partial`` first, so that ``root`` exists only when it is complete. The unpaired
    garment of test sample i is that of sample i + 1 (the last takes the first). ``annotations`` adds human-parsing
    maps (``image-parse-v3``) and keypoints (``openpose_json``).

    Raises:
        DataError: ``root`` exists and is something else, or the counts are impossible.
    """
    root = root.absolute()
    description = _description(train, test, size, seed, annotations)
    _check_request(train, test, size)
    if root.exists():
        _check_same(root, description)
        return root
    with staged(root) as folder:
        for split in Split:
            for role in FOLDERS:
                (folder / split / role).mkdir(parents=True)
        write = partial(_render_and_write, folder, size, seed, annotations)
        jobs = [(Split.TRAIN, index) for index in range(train)]
        jobs += [(Split.TEST, FIRST_TEST_INDEX + index) for index in range(test)]
        _write_samples(write, jobs, workers, progress)
        _write_pairs(folder, train, test)
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return root


def _check_request(train: int, test: int, size: GridSize) -> None:
    """Refuse counts and sizes that cannot be drawn."""
    if not (1 <= train <= MAX_SAMPLES and 2 <= test <= MAX_SAMPLES):
        raise DataError(
            f"Cannot make {train} training and {test} test samples: train must be 1 to {MAX_SAMPLES} and test 2 to "
            f"{MAX_SAMPLES} (an unpaired test needs two garments). Change data.train and data.test."
        )
    if min(size) < 16:
        raise DataError(f"Size {size} is too small to draw; height and width must be at least 16. Change data.size.")


def _check_same(root: Path, description: dict[str, Any]) -> None:
    """Accept an existing folder only if it holds exactly the dataset that was asked for."""
    file = root / DESCRIPTION_FILE
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = None
    if found != description:
        what = "no readable dataset.json" if found is None else f"another dataset ({json.dumps(found)})"
        raise DataError(
            f"{root} exists and holds {what}; expected {json.dumps(description)}. Nothing was changed. "
            "Choose another root, or delete that folder."
        )


def _write_samples(
    write: Callable[[tuple[Split, int]], None], jobs: list[tuple[Split, int]], workers: int | None, progress: bool
) -> None:
    """Render and write, in processes where there is enough to do."""
    count = max(1, (os.cpu_count() or 1) if workers is None else workers)
    with tqdm(total=len(jobs), desc="drawing samples", unit="sample", disable=not progress) as bar:
        if count == 1 or len(jobs) < 64:
            for job in jobs:
                write(job)
                bar.update()
            return
        helpers: dict[Connection, SpawnProcess] = {}
        try:
            # In a thread: signals are handled in the main one, and cannot leave a helper half started.
            with ThreadPoolExecutor(1) as aside:
                aside.submit(_start_helpers, helpers, write, [jobs[first::count] for first in range(count)]).result()
            _count_samples(helpers, bar)
        finally:
            for helper in helpers.values():
                helper.kill()  # what is half written lies in a folder that is begun anew
            for helper in helpers.values():
                helper.join()


def _start_helpers(helpers: dict[Connection, SpawnProcess], write: Callable[..., None], shares: list[Any]) -> None:
    """Start one process per share, and add it with the connection on which it says what it has written.

    They inherit that this thread takes no signals: Ctrl-C, which a terminal sends to all, is the command's affair.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (torch, OpenCV) may hang
    resource_tracker.ensure_running()  # its start would let the signals through
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    for share in shares:
        receiving, sending = context.Pipe(duplex=False)
        helper = context.Process(target=_write_share, args=(write, share, sending), daemon=True)
        helper.start()
        helpers[receiving] = helper
        sending.close()


def _count_samples(helpers: dict[Connection, SpawnProcess], bar: tqdm[Any]) -> None:
    """Until all helpers have ended: count what they say they have written, raise what stopped them."""
    running = dict(helpers)
    while running:
        for connection in cast("list[Connection]", wait(list(running))):
            try:
                fault = connection.recv()
            except EOFError:
                helper = running.pop(connection)
                helper.join()
                if helper.exitcode:
                    raise BrokenProcessPool(f"a process that draws ended with status {helper.exitcode}") from None
                continue
            if fault is not None:
                raise fault
            bar.update()


def _write_share(write: Callable[[Any], None], jobs: list[Any], said: Connection) -> None:
    """What a helper does: for each sample it says None; or the error that ends it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        for job in jobs:
            write(job)
            said.send(None)
    except BrokenPipeError:  # the command was killed
        return
    except Exception as error:
        error.add_note(traceback.format_exc())  # with --debug: it does not travel otherwise
        said.send(error)


def _render_and_write(root: Path, size: GridSize, seed: int, annotations: bool, job: tuple[Split, int]) -> None:
    """One sample of a process pool."""
    split, index = job
    write_sample(root / split, render_sample(seed, index, size))
    if annotations:
        name, (parsed, joints) = sample_name(index), render_annotations(seed, index, size)
        write_labels(root / split / Role.PARSING / f"{name}.png", parsed, VITON_HD)
        write_text(root / split / Role.KEYPOINTS / f"{name}_keypoints.json", openpose_json(joints))


def write_sample(folder: Path, sample: SyntheticSample) -> None:
    """Write one sample into the folders of a split."""
    name, garment = sample.name, sample.garment_name
    colours = {
        f"image/{name}.jpg": sample.person, f"cloth/{garment}.jpg": sample.garment,
        f"agnostic-v3.2/{name}.jpg": sample.agnostic, f"image-densepose/{name}.jpg": sample.densepose,
    }  # fmt: skip
    masks = {
        f"cloth-mask/{garment}.jpg": sample.garment_mask, f"agnostic-mask/{name}_mask.png": sample.inpaint_mask,
        f"gt_cloth_warped_mask/{name}.jpg": sample.warped_garment_mask,
    }  # fmt: skip
    for file, picture in colours.items():
        _write(folder / file, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    for file, mask in masks.items():
        _write(folder / file, mask.astype(np.uint8) * np.uint8(255))
    _write(folder / f"correspondence/{name}.png", encode_correspondence(sample.correspondence)[..., ::-1])


def _write(path: Path, picture: NDArray[np.generic]) -> None:
    """Write a picture; not in one step, as the whole folder appears in one."""
    options = WRITING[".jpg"] if path.suffix == ".jpg" else PNG
    # Not cv2.imwrite, which does not say why it failed.
    _, content = cv2.imencode(path.suffix, np.ascontiguousarray(picture), options)
    with named_errors(path):
        path.write_bytes(content.tobytes())


def _write_pairs(root: Path, train: int, test: int) -> None:
    """Pair lists: training pairs are a person and their own garment, test pairs are unpaired."""
    names = [f"{sample_name(index)}.jpg" for index in range(train)]
    (root / "train_pairs.txt").write_text("".join(f"{name} {name}\n" for name in names))
    names = [f"{sample_name(FIRST_TEST_INDEX + index)}.jpg" for index in range(test)]
    others = names[1:] + names[:1]
    (root / "test_pairs.txt").write_text("".join(f"{a} {b}\n" for a, b in zip(names, others, strict=True)))
