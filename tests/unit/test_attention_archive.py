"""attention/archive.py: a capture survives the disk, and other files are refused."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord, load_maps, save_maps
from i2am_train.errors import CaptureError, DataError
from i2am_train.types import Direction, GridSize

BATCH, STEPS = 2, 3


@pytest.fixture
def maps():
    def record(name, grid, reference_grid, matrices):
        tokens = 6
        logits = torch.randn(BATCH, grid.tokens, tokens)
        return LayerRecord(
            name,
            grid,
            reference_grid,
            torch.rand(BATCH, STEPS, 4, grid.tokens),
            torch.rand(BATCH, STEPS, 4, tokens),
            reference_grid is not None,
            logits.softmax(-1) if matrices else None,
            logits.softmax(-2) if matrices else None,
        )

    records = (
        record("up_blocks.1.attentions.0", GridSize(4, 3), GridSize(3, 2), True),
        record("up_blocks.1.attentions.1", GridSize(8, 6), None, False),
    )
    return AttributionMaps(AttributionStore(records, (999.0, None, 1.0)))


def test_round_trip_is_exact(maps, tmp_path):
    archive = load_maps(save_maps(maps, tmp_path / "new" / "maps.safetensors", ["00017_00", "00020_00"]))
    assert archive.names == ("00017_00", "00020_00")
    before, after = maps.store, archive.maps.store
    assert (after.timesteps, after.names) == (before.timesteps, before.names)
    for old, new in zip(before.layers, after.layers, strict=True):
        for field in ("generated_grid", "reference_grid", "functional"):
            assert getattr(old, field) == getattr(new, field)
        for field in ("to_generated", "to_reference"):
            assert torch.equal(getattr(old, field), getattr(new, field))
    assert torch.equal(archive.maps.scores(1), maps.scores(1))
    assert after.layers[1].scores_over_reference is None
    direction = Direction.REFERENCE_TO_GENERATED
    assert torch.equal(archive.maps.unified(direction).values, maps.unified(direction).values)


def test_nothing_half_written_stays(maps, tmp_path, monkeypatch):
    target = tmp_path / "maps.safetensors"
    target.write_text("an older file")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("i2am_train.attention.archive.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_maps(maps, target)
    assert [path.name for path in tmp_path.iterdir()] == ["maps.safetensors"]
    assert target.read_text() == "an older file"


def test_names_must_fit_the_batch(maps, tmp_path):
    with pytest.raises(DataError, match="3 names were given for 2 samples"):
        save_maps(maps, tmp_path / "maps.safetensors", ["a", "b", "c"])


def test_other_files_are_refused(tmp_path):
    text, weights = tmp_path / "text", tmp_path / "weights.safetensors"
    text.write_text("no safetensors")
    save_file({"weight": torch.zeros(2, 3)}, weights)
    with pytest.raises(DataError, match="cannot be read as an attribution archive"):
        load_maps(text)
    with pytest.raises(DataError, match="cannot be read as an attribution archive"):
        load_maps(tmp_path / "missing")
    with pytest.raises(DataError, match="is not an attribution archive"):
        load_maps(weights)


def test_an_archive_of_another_version_is_called_that(maps, tmp_path):
    path = tmp_path / "maps.safetensors"
    save_maps(maps, path, ["a", "b"])
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata() | {"format": "i2am-attribution-9"}
    save_file(tensors, path, metadata)
    with pytest.raises(DataError, match=r"of another version \(its format is 'i2am-attribution-9'"):
        load_maps(path)


@pytest.mark.parametrize(
    ("field", "where", "message"),
    [
        ("to_generated", (1, 2, 3, 5), r"layer up_blocks.1.attentions.1 in step 3 of 3 \(timestep 1\)"),
        ("to_reference", (0, 1, 0, 2), r"layer up_blocks.1.attentions.1 in step 2 of 3\."),
        ("scores_over_generated", (1, 3, 2), r"the score matrix of layer up_blocks.1.attentions.0"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_no_numbers_are_neither_written_nor_read(
    maps, tmp_path, field, where, message, value
):  # fmt: skip
    file = save_maps(maps, tmp_path / "maps.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    record = maps.store.layers[field[0] == "t"]
    getattr(record, field)[where] = value
    with pytest.raises(DataError, match=rf"{message}.*Nothing was written"):
        save_maps(maps, tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    tensors[f"{record.layer}/{field}"][where] = value
    save_file(tensors, file, metadata)
    with pytest.raises(DataError, match=rf"holds maps that are not finite numbers: .*{message}"):
        load_maps(file)


def test_layer_numbers_are_those_of_the_whole_model(maps, tmp_path):
    # one layer of nine was captured; its number is not that of the only one
    names = tuple(f"up_blocks.{b}.attentions.{a}.transformer_blocks.0" for b in (1, 2, 3) for a in range(3))
    layer = replace(maps.store.layers[0], layer=names[4])
    store = AttributionStore((layer,), (999.0, None, 1.0), model=names)
    read = load_maps(save_maps(AttributionMaps(store), tmp_path / "maps.safetensors")).maps.store
    for one in (store, read):
        assert one.layer(5) is one.layers[0]
        with pytest.raises(CaptureError, match=rf"No attention layer is called '{names[1]}'"):
            one.layer(2)
