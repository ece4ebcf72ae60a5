"""How long a study took by the clock, whatever stopped it on the way."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from i2am_train.workflows import ablate
from i2am_train.workflows.ablate import TIMES, covered_seconds


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ([], 0),
        ([(100, 160)], 60),
        ([(100, 160), (100, 160)], 60),
        ([(100, 160), (130, 190)], 90),  # two at a time
        ([(130, 140), (100, 200), (150, 260)], 160),
        ([(100, 160), (1000, 1030)], 90),  # stopped, and continued later
    ],
)
def test_time_by_the_clock(times: list[tuple[float, float]], seconds: float) -> None:
    """What several cells share counts once, pauses do not count."""
    assert covered_seconds(times) == seconds


def test_a_stopped_cell_keeps_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a minute, continued an hour later for half a minute; another cell ran beside its end."""
    cells = [tmp_path / name for name in ("stopped", "other")]
    for cell in cells:
        cell.mkdir()
    clock = iter([1000.0, 1060.0, 4600.0, 4630.0])
    monkeypatch.setattr(ablate, "time", SimpleNamespace(time=lambda: next(clock)))
    with pytest.raises(KeyboardInterrupt, match="stop"), ablate._timed(cells[0]):
        raise KeyboardInterrupt("stop")
    with ablate._timed(cells[0]):
        pass
    assert json.loads((cells[0] / TIMES).read_text()) == [[1000.0, 1060.0], [4600.0, 4630.0]]
    assert ablate._wall_minutes(tmp_path, cells) is None, "the other is of an earlier version"
    (cells[1] / TIMES).write_text("[[4615.0, 4660.0]]")
    assert ablate._wall_minutes(tmp_path, cells) == 2.0
    (tmp_path / TIMES).write_text("[[4580.0, 4664.0]]")  # processes that begin and end; of its first time it was killed
    assert ablate._wall_minutes(tmp_path, cells) == 2.4


def test_a_cell_that_was_not_begun_leaves_nothing(tmp_path: Path) -> None:
    """Bad input ends before its folder is there."""
    with pytest.raises(ValueError, match="bad"), ablate._timed(tmp_path / "cell"):
        raise ValueError("bad")
    assert not (tmp_path / "cell").exists()
