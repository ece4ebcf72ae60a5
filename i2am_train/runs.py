"""Run folders: what was run, on what, from which seed; nothing half written, nothing overwritten.

A run folder holds ``settings.json`` (the options, as plain values) and ``manifest.json`` (command,
code, machine, data, times). Opening a folder with the same settings continues the run; with others
it is refused.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from i2am_train.environment import now, provenance, shown
from i2am_train.errors import RunFolderError
from i2am_train.files import json_text, read_json, read_object, write_json
from i2am_train.fingerprints import RECORD_FILE, DataRecord, DataState, part_of
from i2am_train.locks import LOCK

SETTINGS_FILE = "settings.json"
MANIFEST_FILE = "manifest.json"
MODEL_FOLDER = "model"
"""Where a finished training run keeps its model, inside the run folder."""
SNAPSHOTS_FOLDER = "snapshots"
"""Where it keeps copies of the model on its way: ``snapshots/step-000100``, ..."""
BEST_FOLDER, BEST_RECORD = "best", "best.json"
"""Where it keeps the best model by a validation score, and of which score, value and step that is."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that belongs to one run."""

    path: Path
    resumed: bool
    """True if the folder held this run already when it was opened."""

    @classmethod
    def open(
        cls, path: Path, settings: Mapping[str, Any], *, resume: bool = True, may_differ: Collection[str] = ()
    ) -> RunFolder:
        """Create the folder of a run, or continue the run of the same settings that lies in it.

        Args:
            path: the folder; made with its parents if missing.
            settings: the run's options as nested plain values.
            resume: False refuses a folder that holds a run, even with the same settings.
            may_differ: dotted names of options, or of whole groups, that do not have to agree.

        Raises:
            RunFolderError: the folder holds other settings, or files that are not a run's.
        """
        path = path.absolute()
        resumed = cls.check(path, settings, resume=resume, may_differ=may_differ)
        if not resumed:
            write_json(path / SETTINGS_FILE, settings)
        return cls(path, resumed=resumed)

    @staticmethod
    def check(
        path: Path, settings: Mapping[str, Any], *, resume: bool = True, may_differ: Collection[str] = ()
    ) -> bool:
        """Fail as ``open`` would, before work that ends there, and write nothing; True if the run is there already."""
        saved = _saved_settings(path)
        if saved is None:
            _refuse_foreign_files(path)
            return False
        if not resume:
            raise RunFolderError(
                f"{path} already holds a run, and resume=false. Nothing was changed. "
                "Give another output=FOLDER, or delete that one."
            )
        # As they read after a round trip through the file: a run goes on with another password in an address.
        _refuse_other_settings(path, saved, json.loads(json_text(settings)), may_differ)
        return True

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` says; empty before ``start``."""
        file = self.path / MANIFEST_FILE
        return read_object(file) if file.is_file() else {}

    @property
    def finished(self) -> bool:
        """True if the run came to its end."""
        return self.manifest.get("finished") is not None

    def start(self, *, seed: int | None = None, data: DataState | str | None = None) -> None:
        """Write the manifest of a run that begins now, or note in it that the run goes on.

        Args:
            seed: the run's seed.
            data: the files of the dataset, or a fingerprint of other data.

        Raises:
            RunFolderError: the run began with other data; files that it could not read may have been replaced.
        """
        manifest, fingerprint = self.manifest, _fingerprint(data)
        if manifest:
            if manifest.get("data") != fingerprint:
                manifest["repaired"] = [*manifest.get("repaired", ()), *self._repaired(data)]
                manifest["data"] = fingerprint
            manifest["resumed"] = [*manifest.get("resumed", ()), now()]
        else:
            manifest = {**provenance(), "seed": seed, "data": fingerprint}
            manifest |= {"settings": read_json(self.path / SETTINGS_FILE)}
            manifest |= {"started": now(), "resumed": [], "finished": None}
        if isinstance(data, DataState):
            DataRecord(self.path).write(data)
        write_json(self.path / MANIFEST_FILE, manifest)

    def _repaired(self, data: DataState | str | None) -> list[str]:
        """Files that were replaced because this run could not read them; refuses other changes of the data."""
        record, changes = DataRecord(self.path), ""
        if isinstance(data, DataState):
            if repaired := record.repaired(data):
                warnings.warn(
                    f"{len(repaired)} files that the run in {self.path} could not read were replaced "
                    f"({', '.join(repaired[:3])}); it goes on with the new ones.",
                    stacklevel=3,
                )
                return repaired
            changes = record.changes(data)
        raise RunFolderError(
            f"The run in {self.path} began with other data: fingerprint {self.manifest.get('data')}, now "
            f"{_fingerprint(data)}. Files of the dataset were added, removed or changed since"
            f"{f': {changes}' if changes else ''}. Nothing was changed. Give another output=FOLDER, or put the data "
            "back to continue that run."
        )

    def discard(self) -> None:
        """Remove a folder that was made for this run and holds nothing of it yet.

        A folder that held the run already, or that holds more than its settings, is left alone.
        """
        own = {SETTINGS_FILE, MANIFEST_FILE, RECORD_FILE}
        if self.resumed or not {entry.name for entry in self.path.iterdir()} <= {*own, LOCK}:
            return
        for name in own:
            (self.path / name).unlink(missing_ok=True)
        if not (self.path / LOCK).is_file():  # else whoever holds the lock removes the folder at the end
            self.path.rmdir()

    def finish(self, **results: Any) -> None:
        """Note in the manifest that the run came to its end, with what else is worth noting."""
        write_json(self.path / MANIFEST_FILE, {**self.manifest, **results, "finished": now()})


def run_of(checkpoint: Path) -> tuple[Path, int | None] | None:
    """The training run that a folder of weights lies in, with the step of a snapshot; None elsewhere.

    The finished and the best model have no step here. Goes by the path alone: the folders need not be there any more.

    >>> run_of(Path("runs/refined-seed0/snapshots/step-000100"))
    (PosixPath('runs/refined-seed0'), 100)
    >>> run_of(Path("runs/refined-seed0/model"))
    (PosixPath('runs/refined-seed0'), None)
    """
    if checkpoint.name in (MODEL_FOLDER, BEST_FOLDER):
        return checkpoint.parent, None
    step = re.fullmatch(r"step-(\d+)", checkpoint.name)
    if checkpoint.parent.name == SNAPSHOTS_FOLDER and step:
        return checkpoint.parents[1], int(step[1])
    return None


def checkpoint_label(checkpoint: Path) -> str:
    """A checkpoint's short name: that of its folder, or of the run that it belongs to.

    >>> checkpoint_label(Path("runs/refined-seed0/model")), checkpoint_label(Path("weights/tiny"))
    ('refined-seed0', 'tiny')
    >>> checkpoint_label(Path("runs/refined-seed0/snapshots/step-000100"))
    'refined-seed0-step-000100'
    >>> checkpoint_label(Path("runs/refined-seed0/best"))
    'refined-seed0-best'
    """
    place = run_of(checkpoint)
    if place is None:
        return checkpoint.name
    return f"{place[0].name}{model_suffix(checkpoint)}"


def folder_beside(checkpoint: Path, name: str) -> Path:
    """Where what is found out about a checkpoint lies by default: in its run, or in ``runs/`` where it has none.

    >>> folder_beside(Path("weights/tiny"), "evaluation-paired") == Path.cwd() / "runs/tiny-evaluation-paired"
    True
    """
    if (checkpoint / SETTINGS_FILE).is_file():
        return checkpoint / name
    place = run_of(checkpoint)
    if place is not None and (place[0] / SETTINGS_FILE).is_file():
        return place[0] / f"{name}{model_suffix(checkpoint)}"
    return Path.cwd() / "runs" / f"{checkpoint.name}-{name}"


def model_suffix(checkpoint: Path) -> str:
    """What tells one of a run's models from its finished one, in names of folders; empty for that one.

    >>> model_suffix(Path("runs/refined-seed0/best")), model_suffix(Path("runs/refined-seed0/model"))
    ('-best', '')
    """
    return "" if checkpoint.name == MODEL_FOLDER else f"-{checkpoint.name}"


def best_step(run: Path) -> int | None:
    """The step of a run's best model so far; None where it keeps none.

    >>> best_step(Path("/nowhere")) is None
    True
    """
    file = run / BEST_RECORD
    return int(read_json(file)["step"]) if file.is_file() else None


def require_apart(data: Path, *outputs: Path | None, counts: Callable[[PurePath], bool] | None = None) -> None:
    """Fails where a command would write among the data that it reads, or the data lie in what it writes.

    The first would change the data with every file, so that nothing made of them could ever be continued.

    Args:
        data: the folder of a dataset, or of pictures.
        outputs: folders and files that the command writes.
        counts: whether a name below ``data`` belongs to the data; None: beside a dataset's own files there is room.

    Raises:
        RunFolderError: one of the folders lies inside the other, through links, too.

    >>> require_apart(Path("/data/viton"), Path("/data/viton/train/run"), counts=lambda name: True)
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: /data/viton/train/run lies among the data in /data/viton, which everything ...
    """
    root = Path(os.path.realpath(data))
    counts = counts or part_of(root)
    for output in filter(None, outputs):
        place = Path(os.path.realpath(output))
        if root.is_relative_to(place):
            raise RunFolderError(
                f"The data in {root} lie inside {output}, which is to be this command's own folder. Nothing was "
                "written. Give another folder, for example with output=FOLDER."
            )
        if place.is_relative_to(root) and counts(place.relative_to(root)):
            raise RunFolderError(
                f"{output} lies among the data in {root}, which everything written there would change. Nothing was "
                "written. Give another place, for example with output=FOLDER."
            )


def _fingerprint(data: DataState | str | None) -> str | None:
    return data.fingerprint if isinstance(data, DataState) else data


def _saved_settings(path: Path) -> dict[str, Any] | None:
    file = path / SETTINGS_FILE
    return dict(shown(read_object(file))) if file.is_file() else None


def _refuse_foreign_files(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file. Give another output=FOLDER.")
    foreign = sorted({entry.name for entry in path.iterdir()} - {LOCK}) if path.is_dir() else []
    if foreign:
        names = ", ".join(foreign[:5])
        raise RunFolderError(
            f"{path} holds files ({names}) but no {SETTINGS_FILE}, so it is not the folder of a "
            "run. Nothing was changed. Give another output=FOLDER, or empty that one."
        )


def _refuse_other_settings(
    path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    old, new = dict(_leaves(saved)), dict(_leaves(wanted))
    differences = [
        f"{name}={new.get(name)} (there: {old.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(f"{name}.".startswith(f"{free}.") for free in may_differ)
    ]
    if differences:
        named = ", ".join(differences[:8]) + (", ..." if len(differences) > 8 else "")
        raise RunFolderError(
            f"{path} already holds a run of another configuration: {named}. Nothing was changed. "
            "Give another output=FOLDER, or the same options to continue that run."
        )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
