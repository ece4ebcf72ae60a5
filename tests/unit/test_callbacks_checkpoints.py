"""Checkpoints are written whole; which one a stopped run goes on from, and what becomes of damaged ones."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from i2am_train.callbacks.checkpoints import PARTS, AtomicCheckpointIO, resume_point, steps_done
from i2am_train.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's own deprecations


def save(run: Path, step: int, name: str = "step-{:06d}.ckpt") -> Path:
    file = run / "checkpoints" / name.format(step)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"w": torch.randn(50, 40)}, "global_step": step}, file)
    return file


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:4000])


def text(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1")


def folder(file: Path) -> None:
    file.unlink()
    (file / "mp_rank_00").mkdir(parents=True)


def other_archive(file: Path) -> None:
    file.unlink()
    (file.parent / "inside.txt").write_text("x")
    made = shutil.make_archive(str(file), "zip", file.parent, "inside.txt")
    (file.parent / "inside.txt").unlink()
    Path(made).rename(file)


def changed_inside(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    empty: "is empty",
    cut_off: "is cut off, or no checkpoint",
    text: "is cut off, or no checkpoint",
    folder: "is a folder",
    other_archive: "is no checkpoint",
    changed_inside: r"is damaged \(in .*data/0\)",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """The one before is taken, and what was damaged is kept under another name."""
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    damage(newest)
    sort = newest.is_dir()
    checkpoint, said = resume_point(tmp_path)
    assert checkpoint == before
    (sentence,) = said
    assert sentence.startswith(f"{newest} ")
    assert "kept as step-000010.ckpt.damaged. The run goes on from step-000009.ckpt." in sentence
    assert re.search(DAMAGE[damage], sentence)
    assert not newest.exists()
    assert newest.with_name("step-000010.ckpt.damaged").is_dir() == sort
    assert steps_done(tmp_path) == 9
    damage(save(tmp_path, 10))  # once more: the first damaged one is kept, too
    resume_point(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000009.ckpt", "step-000010.ckpt.damaged", "step-000010.ckpt.damaged2"]


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path: Path) -> None:
    """That would throw away what the user may still mend; it is refused again and again."""
    cut_off(save(tmp_path, 9))
    empty(save(tmp_path, 10))
    for _ in range(2):
        with pytest.raises(
            CheckpointError,
            match=r"step-000010\.ckpt is empty, step-000009\.ckpt is cut off.*delete them to train this run anew",
        ):
            resume_point(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_the_last_step_counts_and_not_the_name(tmp_path: Path) -> None:
    """Beyond 999999 steps, and where a run was stopped in between; no folder, no checkpoint."""
    assert resume_point(tmp_path / "new") == (None, [])
    save(tmp_path, 999_999)
    last = save(tmp_path, 1_000_000)
    assert resume_point(tmp_path) == (last, [])
    stopped = save(tmp_path, 1_000_001, "interrupted-step-{:06d}.ckpt")
    assert resume_point(tmp_path) == (stopped, [])


def test_of_two_of_the_same_step_the_whole_one_is_taken(tmp_path: Path) -> None:
    regular = save(tmp_path, 7)
    stopped = save(tmp_path, 7, "interrupted-step-{:06d}.ckpt")
    for broken, whole in ((regular, stopped), (stopped, regular)):
        for name in ("step-{:06d}.ckpt", "interrupted-step-{:06d}.ckpt"):
            save(tmp_path, 7, name)
        cut_off(broken)
        assert resume_point(tmp_path)[0] == whole


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fills up half-way, the old file is still whole and in its place."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"weights": torch.arange(6.0).reshape(2, 3)}, path)

    def disk_full(self: Any, checkpoint: Any, path: Path, options: Any = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", disk_full)
    with pytest.raises(OSError, match="no space left"):
        writer.save_checkpoint({"weights": torch.zeros(2, 3)}, path)
    assert torch.equal(torch.load(path)["weights"], torch.arange(6.0).reshape(2, 3))


def test_a_save_replaces_the_last_checkpoint(tmp_path: Path) -> None:
    """The new content under the same name, and no temporary file beside it."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    rest: dict[str, Any] = {name: {} for name in PARTS - {"state_dict"}}
    for value in (1.0, 2.0):
        state = {"weights": torch.full((2, 3), value)}
        writer.save_checkpoint({"state_dict": state, **rest}, path)
    weights = writer.load_checkpoint(path)["state_dict"]["weights"]
    assert torch.equal(weights, torch.full((2, 3), 2.0))
    assert list(tmp_path.iterdir()) == [path]


def test_another_file_of_torch_is_no_checkpoint(tmp_path: Path) -> None:
    """Somebody's weights under a checkpoint's name are not taken for one."""
    torch.save({"weights": torch.zeros(2, 3)}, tmp_path / "step-000007.ckpt")
    with pytest.raises(CheckpointError, match="is no checkpoint of a training: expected global_step"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step-000007.ckpt")
