"""Properties of dataset code that hold for all inputs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from i2am_train.data.module import EpochSampler, ExactSampler
from i2am_train.data.picture_files import decode_correspondence, encode_correspondence
from i2am_train.data.synthetic.garments import hsv
from i2am_train.data.transforms import move_coordinates

UNIT = st.floats(0, 1, width=32)


@given(arrays(np.float32, (3, 5, 2), elements=UNIT), arrays(np.bool_, (3, 5)))
def test_stored_correspondence_comes_back(values: np.ndarray, known: np.ndarray) -> None:
    # Proves the precision of the file format, and that unknown stays unknown.
    values[~known] = np.nan
    read = decode_correspondence(encode_correspondence(values))
    np.testing.assert_array_equal(np.isnan(read[..., 0]), ~known)
    np.testing.assert_allclose(read[known], values[known], atol=1 / 131_000)


@given(arrays(np.float32, (2, 4, 2), elements=st.floats(0.375, 0.625, width=32)), st.floats(0.8, 1.2), st.floats(-4, 4))
def test_moving_coordinates_there_and_back_changes_nothing(values: np.ndarray, scale: float, shift: float) -> None:
    # Proves that coordinates follow an affine pixel matrix in the right order of axes.
    matrix = np.array([[scale, 0.0, shift], [0.0, scale, -shift / 2], [0.0, 0.0, 1.0]])
    there = move_coordinates(values, matrix, (60, 40))
    back = move_coordinates(there, np.linalg.inv(matrix), (60, 40))
    np.testing.assert_allclose(back, values, atol=1e-5)


@given(st.integers(1, 50), st.integers(1, 7))
def test_evaluation_sees_each_sample_once_whatever_the_processes(samples: int, processes: int) -> None:
    # Proves that splitting neither repeats nor drops a sample, and is even to one sample.
    parts = [list(ExactSampler(range(samples), processes, rank)) for rank in range(processes)]  # type: ignore[arg-type]
    assert sorted(position for part in parts for position in part) == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(7, 50), st.integers(1, 7), st.integers(0, 5))
def test_training_processes_never_share_a_sample(samples: int, processes: int, epoch: int) -> None:
    # Proves that ranks get equally many samples, all different.
    parts = [
        [item.position for item in EpochSampler(range(samples), 3, epoch, processes, rank)]  # type: ignore[arg-type]
        for rank in range(processes)
    ]
    together = [position for part in parts for position in part]
    assert len(set(together)) == len(together)
    assert len({len(part) for part in parts}) == 1


@given(UNIT, UNIT, UNIT)
def test_colours_stay_in_range(hue: float, saturation: float, value: float) -> None:
    # Proves the colour formula: within 0..255, brightest channel equal to the value.
    colour = hsv(hue, saturation, value)
    assert colour.min() >= -1e-9
    assert colour.max() <= 255 + 1e-9
    np.testing.assert_allclose(colour.max(), 255 * value, atol=1e-3)
