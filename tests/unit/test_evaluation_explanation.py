"""The folder of an explained sample: nothing is lost on the way, and a damaged one is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from i2am_train.errors import DataError, RunFolderError
from i2am_train.evaluation.explanation import SCHEMA, explanation_folders, read_explanation, write_explanation
from i2am_train.types import Direction, GridSize


@pytest.fixture
def folder(make_explained, write_explained_run, tmp_path):
    return write_explained_run(make_explained(), tmp_path / "sample")


def test_everything_comes_back_as_it_was(make_explained, folder):
    before, after = make_explained(), read_explanation(folder)
    for name in ("images", "masks"):
        kept, original = getattr(after, name), getattr(before, name)
        assert list(kept) == list(original)
        assert all(np.array_equal(kept[key], original[key]) for key in original)
    np.testing.assert_array_equal(after.correspondence, before.correspondence)
    for new, old in zip(after.clean, before.clean, strict=True):
        assert (new.step_index, new.timestep) == (old.step_index, old.timestep)
        assert np.array_equal(new.picture, old.picture)
    for layer in before.maps.layers:
        assert torch.equal(after.maps.scores(layer), before.maps.scores(layer))
    same = ("name", "inputs", "index", "paired", "layer", "scores", "generated_patches", "model")
    for name in (*same, "reference_patches", "origin", "delta", "weighting", "time_groups"):
        assert getattr(after, name) == getattr(before, name), name


def test_a_sample_without_truth_has_no_true_places(make_explained, write_explained_run, tmp_path):
    sample = make_explained(correspondence=None, model="other")
    read = read_explanation(write_explained_run(sample, tmp_path / "x"), model="mine")
    assert read.correspondence is None
    assert read.model == "mine"
    assert np.isnan(read.true_places(GridSize(4, 3), GridSize(6, 5))).all()


def test_true_places_are_yx_in_reference_patches(make_explained):
    # The correspondence is the identity: the cell (1, 1) of 4x3 is centred at 1.5/4, 1.5/3.
    places = make_explained().true_places(GridSize(4, 3), GridSize(6, 5))
    np.testing.assert_allclose(places[1 * 3 + 1], [1.5 / 4 * 6 - 0.5, 1.5 / 3 * 5 - 0.5], atol=1e-5)
    assert np.isnan(places[0]).all()  # off the garment


def test_the_unified_map_is_the_one_that_is_scored(make_explained):
    sample = make_explained()
    whole = sample.unified(Direction.REFERENCE_TO_GENERATED)
    above = sample.unified(Direction.REFERENCE_TO_GENERATED, thresholded=True)
    assert whole.shape == (48, 36)
    assert (whole.min(), whole.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(above, np.where(whole > 0.4, whole, 0.0))


def test_a_run_of_several_samples_has_a_folder_for_each(make_explained, write_explained_run, tmp_path):
    run = write_explained_run(make_explained(), tmp_path / "run")
    one = [run]
    assert explanation_folders(run) == one
    for name in ("b", "a"):
        write_explanation(run / name, make_explained(name=name))
    (run / "scores.json").unlink()
    assert explanation_folders(run) == [run / "a", run / "b"]
    assert read_explanation(run / "b").name == "b"  # finished, says the manifest above it
    with pytest.raises(RunFolderError, match=r"not the folder of explained samples \(it has no"):
        explanation_folders(tmp_path / "nothing")


def changed(path, **changes):
    """A JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def picture(mode, width):
    return lambda folder: Image.new(mode, (width, 48)).save(folder / "images" / "person.png")


DAMAGE = {
    "not a run": lambda folder: (folder / "manifest.json").unlink(),
    "unfinished": lambda folder: changed(folder / "manifest.json", finished=None),
    "older": lambda folder: (folder / "scores.json").write_text('{"name": "x", "scores": {}}'),
    "no image": lambda folder: (folder / "images" / "person.png").unlink(),
    "no step": lambda folder: (folder / "images" / "clean-003.png").unlink(),
    "half an image": lambda folder: (folder / "images" / "person.png").write_bytes(b"\x89PNG"),
    "grey": picture("L", 36),
    "other size": picture("RGB", 35),
    "other sample": lambda folder: changed(folder / "scores.json", name="00002_00"),
    "other truth": lambda folder: save_file({"x": np.zeros(2)}, folder / "correspondence.safetensors"),
    "no maps": lambda folder: (folder / "maps.safetensors").unlink(),
}


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("not a run", RunFolderError, r"manifest\.json is missing"),
        ("unfinished", RunFolderError, "did not come to its end"),
        ("older", RunFolderError, rf"another version \(schema None, this program reads {SCHEMA}\)"),
        ("no image", RunFolderError, r"person\.png cannot be read \(it is missing\)"),
        ("no step", RunFolderError, r"clean-003\.png cannot be read \(it is missing\)"),
        ("half an image", RunFolderError, r"person\.png cannot be read"),
        ("grey", RunFolderError, "its mode is L, expected RGB"),
        ("other size", RunFolderError, "differ in size .*person 48x35"),
        ("other sample", RunFolderError, "holds the maps of 00001_00, and .* describes 00002_00"),
        ("other truth", RunFolderError, r"correspondence\.safetensors cannot be read"),
        ("no maps", DataError, "cannot be read as an attribution archive"),
    ],
)
def test_a_damaged_folder_is_named(folder, what, error, match):
    DAMAGE[what](folder)
    with pytest.raises(error, match=match):
        read_explanation(folder)
