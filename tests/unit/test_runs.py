"""Run folders: created, continued, never overwritten; manifests and seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from i2am_train import environment
from i2am_train.environment import command_line
from i2am_train.errors import RunFolderError
from i2am_train.files import read_json, write_json, write_text, written
from i2am_train.fingerprints import data_state
from i2am_train.locks import staged
from i2am_train.runs import RunFolder

SETTINGS = {"seed": 0, "data": {"root": Path("/data"), "workers": 2}, "betas": (0.9, 0.999)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_settings_continue(tmp_path: Path) -> None:
    """A second opening with equal settings resumes, although paths and tuples went through JSON."""
    first = RunFolder.open(tmp_path / "a" / "run", SETTINGS)
    assert not first.resumed
    assert RunFolder.open(tmp_path / "a" / "run", SETTINGS).resumed


def test_other_settings_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    """The message names what differs, old and new; the folder stays as it was."""
    RunFolder.open(tmp_path / "run", SETTINGS).start(seed=0)
    before = contents(tmp_path)
    other = {**SETTINGS, "seed": 1, "data": {"root": Path("/data"), "workers": 4}}
    with pytest.raises(RunFolderError, match=r"data\.workers=4 \(there: 2\), seed=1 \(there: 0\)"):
        RunFolder.open(tmp_path / "run", other)
    assert contents(tmp_path) == before


def test_options_without_effect_may_differ(tmp_path: Path) -> None:
    """Whole groups and single options can be named as free; a common beginning is not enough."""
    RunFolder.open(tmp_path, SETTINGS)
    other = {**SETTINGS, "data": {"root": Path("/data"), "workers": 4}}
    assert RunFolder.open(tmp_path, other, may_differ=["data.workers"]).resumed
    assert RunFolder.open(tmp_path, other, may_differ=["data"]).resumed
    with pytest.raises(RunFolderError, match=r"data\.workers=4"):
        RunFolder.open(tmp_path, other, may_differ=["data.work"])


def test_a_used_folder_without_resume_is_refused(tmp_path: Path) -> None:
    """resume=false never touches an existing run."""
    RunFolder.open(tmp_path, SETTINGS)
    with pytest.raises(RunFolderError, match=r"already holds a run, and resume=false"):
        RunFolder.open(tmp_path, SETTINGS, resume=False)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A folder of something else, and a file, are not turned into runs."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match=r"holds files \(thesis\.tex\) but no settings\.json"):
        RunFolder.open(tmp_path, SETTINGS)
    with pytest.raises(RunFolderError, match=r"thesis\.tex is a file"):
        RunFolder.open(tmp_path / "thesis.tex", SETTINGS)
    assert list(contents(tmp_path)) == ["thesis.tex"]


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    """A half-written settings file is an error with a way out, not a traceback."""
    (tmp_path / "settings.json").write_text('{"seed": ')
    with pytest.raises(RunFolderError, match=r"settings\.json is not readable JSON .* run again"):
        RunFolder.open(tmp_path, SETTINGS)


def test_manifest_of_a_run(tmp_path: Path) -> None:
    """The manifest tells how the run was made, each resumption, and the end."""
    folder = RunFolder.open(tmp_path, SETTINGS)
    folder.start(seed=0, data="abc")
    first = folder.manifest
    assert not folder.finished
    RunFolder.open(tmp_path, SETTINGS).start(seed=0, data="abc")
    folder.finish(steps=12)
    last = folder.manifest
    assert folder.finished
    assert first["settings"]["betas"] == [0.9, 0.999]
    assert (first["seed"], first["data"], first["resumed"]) == (0, "abc", [])
    assert last["started"] == first["started"]
    assert (len(last["resumed"]), last["steps"]) == (1, 12)
    assert last["versions"]["torch"]
    assert last["machine"]["cores"] >= 1
    assert {"command", "git", "machine", "versions", "finished"} <= last.keys()


def test_other_data_than_at_the_start_are_refused(tmp_path: Path) -> None:
    """A run that goes on with a changed dataset would be of neither; the manifest stays as it was."""
    RunFolder.open(tmp_path, SETTINGS).start(seed=0, data="abc")
    before = (tmp_path / "manifest.json").read_text()
    again = RunFolder.open(tmp_path, SETTINGS)
    with pytest.raises(RunFolderError, match=r"began with other data: fingerprint abc, now xyz"):
        again.start(seed=0, data="xyz")
    assert (tmp_path / "manifest.json").read_text() == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of writing, a file keeps its old content and no temporary one stays."""
    file = tmp_path / "results.json"
    write_json(file, {"a": 1})

    def stop(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        write_text(file, "half")
    assert contents(tmp_path) == {"results.json": b'{\n  "a": 1\n}\n'}


def test_files_of_weights_are_as_readable_as_others(tmp_path: Path) -> None:
    """Safetensors makes its own for the owner alone."""
    (tmp_path / "usual").touch()
    with written(tmp_path / "file.safetensors") as unfinished:
        save_file({"a": torch.zeros(2)}, unfinished)
    with staged(tmp_path / "model") as folder:
        save_file({"a": torch.zeros(2)}, folder / "part.safetensors")
    files = ("usual", "file.safetensors", "model/part.safetensors")
    assert len({(tmp_path / name).stat().st_mode for name in files}) == 1


def test_json_is_strict(tmp_path: Path) -> None:
    """NaN and infinity, which JSON has no word for, become null at any depth."""
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}
    with pytest.raises(RunFolderError, match="is not the folder of a run"):
        read_json(tmp_path / "missing.json")


def test_fingerprint_sees_content_that_matters(tmp_path: Path) -> None:
    """Names, sizes and pair lists count; where the folder lies and when it was written do not."""
    prints = []
    for place, size, pairs in [("a", 3, "x y"), ("b", 3, "x y"), ("c", 4, "x y"), ("d", 3, "x z")]:
        write_text(tmp_path / place / "train_pairs.txt", pairs)
        write_text(tmp_path / place / "train" / "image" / "x.jpg", "." * size)
        prints.append(data_state(tmp_path / place).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_wheel_has_no_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed inside somebody's repository, a run does not claim that repository's commit."""
    (tmp_path / "site-packages" / "i2am_train").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages/i2am_train/runs.py"))
    assert environment.git_state() is None


def test_a_command_is_recorded_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python was called with the module."""
    for program in ("/x/bin/i2am", "/x/i2am_train/__main__.py"):
        monkeypatch.setattr("sys.argv", [program, "train", "seed=1", "arms=[a, b]"])
        assert command_line() == "i2am train seed=1 'arms=[a, b]'"
