"""Pictures that cannot be read, found when a run begins and not in its tenth epoch.

Of each file the header is read, and whether its end is there; damage between the two shows only when a picture is
decoded, which is what ``i2am data check`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from i2am_train.data.checks.missing import wanted_files
from i2am_train.data.picture_files import UnreadablePictureError, read_size
from i2am_train.data.reading import TryOnDataset
from i2am_train.fingerprints import note_unreadable

READERS = 4
"""Threads: enough to wait for a network disk, and few because headers are read under Python's lock."""
PART = 200
"""Files that a thread reads at a time."""
QUICK = 2.0
"""Seconds after which a bar is shown."""
NAMED = 10
"""Broken pictures that a message names."""


def refuse_broken_pictures(datasets: Iterable[TryOnDataset]) -> None:
    """Refuse datasets that could not be read to the end; shows a bar where that takes long.

    Args:
        datasets: opened, so that their files are there.

    Raises:
        UnreadablePictureError: some files are no whole pictures of a kind that is read.
    """
    files = sorted({path for dataset in datasets for path in _files(dataset)})
    parts = [files[first : first + PART] for first in range(0, len(files), PART)]
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(files), desc="looking at pictures", unit="file", delay=QUICK) as bar,
    ):
        broken = []
        for part, found in zip(parts, pool.map(_broken, parts), strict=True):
            broken += found
            bar.update(len(part))
    if broken:
        named = "; ".join(f"{path} {error.fault}" for path, error in broken[:NAMED])
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        root = next(iter(datasets)).root
        raise UnreadablePictureError(
            f"{len(broken)} of the {len(files)} pictures that are needed cannot be read: {named}{more}. "
            f"{broken[0][1].advice} Run 'i2am data check root={root}' for everything that is wrong with the dataset."
        )


def _files(dataset: TryOnDataset) -> Iterator[Path]:
    """All files that a dataset reads."""
    for layout, pairs in dataset.parts():
        for role, stems in wanted_files(layout, pairs).items():
            yield from (layout.path(role, stem) for stem in stems)


def _broken(files: list[Path]) -> list[tuple[Path, UnreadablePictureError]]:
    found = []
    for path in files:
        try:
            read_size(path)
        except UnreadablePictureError as error:
            found.append((path, error))
    return found


@contextmanager
def noted_in(folder: Path) -> Iterator[None]:
    """Lets a folder of results remember pictures that could not be read: when they are replaced, it may go on."""
    try:
        yield
    except UnreadablePictureError as error:
        note_unreadable(folder, str(error))
        raise
