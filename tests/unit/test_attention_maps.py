"""Attribution maps: every view of a store, computed by hand; and their file."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from i2am_train.attention import (
    AttributionMaps,
    AttributionStore,
    HeatMap,
    LayerRecord,
    load_maps,
    save_maps,
    time_groups,
)
from i2am_train.errors import CaptureError, ConfigError, DataError
from i2am_train.ops.grids import normalise, threshold
from i2am_train.types import Direction, GridSize, LayerWeighting

BATCH, STEPS, HEADS = 3, 7, 2
G2R, R2G = Direction.GENERATED_TO_REFERENCE, Direction.REFERENCE_TO_GENERATED
REFERENCE, IMAGE = GridSize(5, 4), GridSize(24, 18)
GRIDS = (GridSize(4, 3), GridSize(4, 3), GridSize(8, 6))


def record(name, grid, seed, heads=HEADS, matrices=False):
    generator = torch.Generator().manual_seed(seed)

    def scores(*shape):
        return torch.randn(*shape, generator=generator)

    logits = scores(BATCH, grid.tokens, REFERENCE.tokens)
    return LayerRecord(
        layer=name,
        generated_grid=grid,
        reference_grid=REFERENCE,
        to_generated=scores(BATCH, STEPS, heads, grid.tokens).softmax(-1),
        to_reference=scores(BATCH, STEPS, heads, REFERENCE.tokens).softmax(-1),
        scores_over_reference=logits.softmax(-1) if matrices else None,
        scores_over_generated=logits.softmax(-2) if matrices else None,
    )


@pytest.fixture(scope="module")
def store():
    names = ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.2.attentions.0")
    layers = zip(names, GRIDS, strict=True)
    records = tuple(record(name, grid, n, matrices=n == 1) for n, (name, grid) in enumerate(layers))
    return AttributionStore(records, tuple(float(t) for t in range(STEPS, 0, -1)))


@pytest.fixture(scope="module")
def maps(store):
    return AttributionMaps(store)


def resized(values, grid, size):
    return F.interpolate(values.reshape(-1, 1, *grid), tuple(size), mode="bilinear").reshape(*values.shape[:-1], *size)


@pytest.mark.parametrize("weighting", list(LayerWeighting))
def test_unified_is_the_mean_over_steps_heads_and_layers(maps, store, weighting):
    found = maps.unified(R2G, weighting)
    layers = [
        resized(layer.to_generated, layer.generated_grid, GridSize(8, 6)).mean(dim=(1, 2))
        * (layer.generated_grid.tokens if weighting is LayerWeighting.DENSITY else 1)
        for layer in store.layers
    ]
    torch.testing.assert_close(found.values, torch.stack(layers).mean(dim=0))
    assert (found.grid, found.axes, found.direction) == (GridSize(8, 6), (), R2G)
    assert found.values.dtype == torch.float32


def test_paper_weighting_lets_the_coarse_layers_dominate(store):
    # 16x12, 32x24, 64x48 weigh 76, 19 and 5 per cent
    grids = (GridSize(16, 12), GridSize(32, 24), GridSize(64, 48))
    shares = []
    for hot in range(3):
        layers = []
        for number, grid in enumerate(grids):
            value = torch.full((1, 1, 1, grid.tokens), float(number == hot) / grid.tokens)
            layers.append(LayerRecord(str(number), grid, None, value, torch.ones(1, 1, 1, 1)))
        made = AttributionMaps(AttributionStore(tuple(layers), (1.0,)))
        shares.append(float(made.unified(R2G).values.mean()))
        assert float(made.unified(R2G, LayerWeighting.DENSITY).values.mean()) == pytest.approx(1 / 3)
    assert [round(100 * share / sum(shares)) for share in shares] == [76, 19, 5]


@pytest.mark.parametrize("direction", list(Direction))
def test_averaging_first_and_resizing_last_equals_the_papers_order(maps, store, direction):
    # resize each head and step, then average: the same, as bilinear resizing is linear
    size = GridSize(16, 12)
    grids = [layer.grid(direction) for layer in store.layers]
    common = max(grids, key=lambda grid: grid.tokens)
    each = [resized(layer.vectors(direction), grid, common) for layer, grid in zip(store.layers, grids, strict=True)]
    paper = torch.stack([values.mean(dim=(1, 2)) for values in each]).mean(dim=0)
    torch.testing.assert_close(maps.unified(direction).values, paper)
    final = resized(paper.flatten(-2), common, size)
    torch.testing.assert_close(maps.unified(direction).resized(size).values, final)


def test_time_level_groups_are_disjoint_and_ordered(maps, store):
    found = maps.time_level(R2G, groups=3)
    assert found.values.shape == (BATCH, 3, 8, 6)
    assert (found.axes, found.labels) == (("time",), (("0", "1", "2"),))
    lengths = [len(range(*run.indices(STEPS))) for run in time_groups(STEPS, 3)]
    assert (sum(lengths), max(lengths) - min(lengths)) == (STEPS, 1)
    weighted = sum(n * found.values[:, g] for g, n in enumerate(lengths)) / STEPS
    torch.testing.assert_close(weighted, maps.unified(R2G).values)
    first = [resized(layer.to_generated[:, :2].mean((1, 2)), layer.generated_grid, GridSize(8, 6))
             for layer in store.layers]  # fmt: skip
    torch.testing.assert_close(found.values[:, 0], torch.stack(first).mean(0))


@pytest.mark.parametrize("groups", [0, 8])
def test_more_groups_than_steps_are_an_error(maps, groups):
    with pytest.raises(ConfigError, match=rf"7 sampling steps cannot be cut into {groups}"):
        maps.time_level(R2G, groups=groups)


def test_head_level_averages_to_the_unified_map(maps):
    found = maps.head_level(G2R)
    assert found.values.shape == (BATCH, HEADS, *REFERENCE)
    torch.testing.assert_close(found.values.mean(dim=1), maps.unified(G2R).values)


def test_layer_level_is_in_the_stores_order_and_in_density(maps, store):
    found = maps.layer_level(R2G)
    assert found.labels == (store.names,)
    torch.testing.assert_close(found.values.mean(dim=(-2, -1)), torch.ones(BATCH, 3))
    only = maps.select([2]).unified(R2G, LayerWeighting.DENSITY, size=GridSize(8, 6))
    second = store.layers[1].to_generated.mean((1, 2)) * GRIDS[1].tokens
    torch.testing.assert_close(found.values[:, 1], resized(second, GRIDS[1], GridSize(8, 6)))
    torch.testing.assert_close(only.values, found.values[:, 1])
    assert only.grid == GridSize(8, 6)


@pytest.mark.parametrize(("rows", "count"), [("time", 5), ("head", HEADS)])
@pytest.mark.parametrize("direction", list(Direction))
def test_two_axis_maps_split_rows_by_resolution(maps, rows, count, direction):
    found = maps.two_axis(direction, rows)
    assert found.values.shape == (BATCH, count, 2, *found.grid)
    assert (found.axes, found.labels[1]) == ((rows, "resolution"), ("4x3", "8x6"))
    one = maps.time_level(direction) if rows == "time" else maps.head_level(direction)
    weighted = (2 * found.values[:, :, 0] + found.values[:, :, 1]) / 3  # two coarse layers, one fine
    torch.testing.assert_close(weighted, one.values)


def test_layers_with_different_head_counts():
    # their sum counts every head once (eq. 7); maps per head exist per head count only
    records = (record("a", GRIDS[0], 1, heads=2), record("b", GRIDS[0], 2, heads=4))
    made = AttributionMaps(AttributionStore(records, tuple(map(float, range(STEPS)))))
    everything = torch.cat([layer.to_reference for layer in records], dim=2).mean(dim=(1, 2))
    torch.testing.assert_close(made.unified(G2R).values.flatten(1), everything)
    for heads in (made.head_level, lambda direction: made.two_axis(direction, "head")):
        with pytest.raises(ConfigError, match=r"different numbers of heads \(2, 4\).*by_head_count"):
            heads(G2R)
    assert {n: part.head_level(G2R).values.shape[1] for n, part in made.by_head_count().items()} == {2: 2, 4: 4}


def test_daams_direction_is_constant_whatever_the_attention(maps):
    found = maps.unified(R2G, softmax_over="reference").values
    torch.testing.assert_close(found, torch.full_like(found, 1 / REFERENCE.tokens))
    assert torch.equal(normalise(found), torch.zeros_like(found))  # no rounding noise as a pattern
    with pytest.raises(ConfigError, match="DAAM"):
        maps.unified(G2R, softmax_over="reference")


class TestPatches:
    def test_patches_by_index_and_by_row_and_column(self, maps, store):
        found = maps.specific_reference([7, (2, 1)], 2)
        assert found.values.shape == (BATCH, 2, *REFERENCE)
        assert torch.equal(found.values[:, 0], found.values[:, 1])
        scores = store.layers[1].scores_over_reference
        assert torch.equal(found.values[:, 0].flatten(1), scores[:, 7])
        assert found.labels == (("7", "7"),)

    def test_reverse_patches_lie_on_the_generated_grid(self, maps, store):
        found = maps.reverse_specific_reference([(4, 3)], 2, size=IMAGE)
        assert found.values.shape == (BATCH, 1, *IMAGE)
        column = store.layers[1].scores_over_generated[:, :, 19]
        torch.testing.assert_close(found.values[:, 0], resized(column, GRIDS[1], IMAGE))

    @pytest.mark.parametrize("patch", [12, -1, (4, 0), (0, 3)])
    def test_a_patch_outside_the_grid_is_an_error(self, maps, patch):
        with pytest.raises(ConfigError, match=r"outside the grid of 4x3.*0..11"):
            maps.specific_reference([patch], 2)

    def test_a_layer_without_its_matrix_is_an_error(self, maps):
        with pytest.raises(CaptureError, match=r"not kept \(kept: up_blocks.1.attentions.1\).*matrix_layers"):
            maps.specific_reference([0], 1)


class TestHeatMap:
    values = torch.tensor([[[[1.0, 3.0, 2.0]], [[5.0, 5.0, 5.0]]], [[[0.0, 1.0, 4.0]], [[2.0, 0.0, 1.0]]]])

    def heat_map(self):
        return HeatMap(self.values, R2G, ("head",), (("0", "1"),))

    def test_each_map_fills_zero_to_one_and_a_constant_one_is_zero(self):
        found = self.heat_map().normalised()
        expected = [[[[0, 1, 0.5]], [[0, 0, 0]]], [[[0, 0.25, 1]], [[1, 0, 0.5]]]]
        assert found.values.tolist() == expected
        assert found.is_normalised

    def test_joint_normalisation_keeps_maps_of_a_sample_comparable(self):
        found = self.heat_map().normalised(joint=True).values
        assert found.tolist() == [[[[0, 0.5, 0.25]], [[1, 1, 1]]], [[[0, 0.25, 1]], [[0.5, 0, 0.25]]]]

    def test_threshold_normalises_first_and_is_strict(self):
        found = self.heat_map().thresholded(0.5).values
        assert found[0].tolist() == [[[0, 1, 0]], [[0, 0, 0]]]
        again = self.heat_map().normalised(joint=True).thresholded(0.3).values
        assert again[0].tolist() == [[[0, 0.5, 0]], [[1, 1, 1]]]

    @pytest.mark.parametrize("delta", [-0.1, 1.0, 40.0, float("nan")])
    def test_delta_outside_zero_to_one_is_an_error(self, delta):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            threshold(self.values, delta)

    def test_what_is_not_a_number_stays_so(self):
        # never a clean map of zeros, also not where one value of many is bad
        values = torch.rand(3, 4, 5)
        values[0, 1, 2], values[1, 3, 4] = float("nan"), float("inf")
        heat = HeatMap(values, Direction.REFERENCE_TO_GENERATED)
        for made in (heat.normalised(), heat.thresholded(0.4), heat.on_picture(GridSize(8, 10))):
            finite = made.values.isfinite().flatten(1).all(dim=1)
            assert finite.tolist() == [False, False, True]

    def test_resizing_forgets_the_normalisation(self):
        # so that a threshold after it normalises again, as the authors do
        found = self.heat_map().normalised().resized(GridSize(2, 6))
        assert not found.is_normalised
        assert float(found.thresholded(0.0).values[0, 0].max()) == 1.0
        same = self.heat_map().normalised()
        assert same.resized(GridSize(1, 3)) is same


@pytest.fixture
def kept():
    def record(name, grid, reference_grid, matrices):
        tokens = 6
        logits = torch.randn(2, grid.tokens, tokens)
        return LayerRecord(
            name,
            grid,
            reference_grid,
            torch.rand(2, 3, 4, grid.tokens),
            torch.rand(2, 3, 4, tokens),
            reference_grid is not None,
            logits.softmax(-1) if matrices else None,
            logits.softmax(-2) if matrices else None,
        )

    records = (
        record("up_blocks.1.attentions.0", GridSize(4, 3), GridSize(3, 2), True),
        record("up_blocks.1.attentions.1", GridSize(8, 6), None, False),
    )
    return AttributionMaps(AttributionStore(records, (999.0, None, 1.0)))


def test_round_trip_is_exact(kept, tmp_path):
    archive = load_maps(save_maps(kept, tmp_path / "new" / "maps.safetensors", ["00017_00", "00020_00"]))
    assert archive.names == ("00017_00", "00020_00")
    before, after = kept.store, archive.maps.store
    assert (after.timesteps, after.names) == (before.timesteps, before.names)
    for old, new in zip(before.layers, after.layers, strict=True):
        for field in ("generated_grid", "reference_grid", "functional"):
            assert getattr(old, field) == getattr(new, field)
        for field in ("to_generated", "to_reference"):
            assert torch.equal(getattr(old, field), getattr(new, field))
    assert torch.equal(archive.maps.scores(1), kept.scores(1))
    assert after.layers[1].scores_over_reference is None
    direction = Direction.REFERENCE_TO_GENERATED
    assert torch.equal(archive.maps.unified(direction).values, kept.unified(direction).values)


def test_nothing_half_written_stays(kept, tmp_path, monkeypatch):
    target = tmp_path / "maps.safetensors"
    target.write_text("an older file")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("i2am_train.attention.maps.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_maps(kept, target)
    assert [path.name for path in tmp_path.iterdir()] == ["maps.safetensors"]
    assert target.read_text() == "an older file"


def test_names_must_fit_the_batch(kept, tmp_path):
    with pytest.raises(DataError, match="3 names were given for 2 samples"):
        save_maps(kept, tmp_path / "maps.safetensors", ["a", "b", "c"])


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


def test_an_archive_of_another_version_is_called_that(kept, tmp_path):
    path = tmp_path / "maps.safetensors"
    save_maps(kept, path, ["a", "b"])
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
    kept, tmp_path, field, where, message, value
):  # fmt: skip
    file = save_maps(kept, tmp_path / "maps.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    record = kept.store.layers[field[0] == "t"]
    getattr(record, field)[where] = value
    with pytest.raises(DataError, match=rf"{message}.*Nothing was written"):
        save_maps(kept, tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    tensors[f"{record.layer}/{field}"][where] = value
    save_file(tensors, file, metadata)
    with pytest.raises(DataError, match=rf"holds maps that are not finite numbers: .*{message}"):
        load_maps(file)


def test_layer_numbers_are_those_of_the_whole_model(kept, tmp_path):
    # one layer of nine was captured; its number is not that of the only one
    names = tuple(f"up_blocks.{b}.attentions.{a}.transformer_blocks.0" for b in (1, 2, 3) for a in range(3))
    layer = replace(kept.store.layers[0], layer=names[4])
    store = AttributionStore((layer,), (999.0, None, 1.0), model=names)
    read = load_maps(save_maps(AttributionMaps(store), tmp_path / "maps.safetensors")).maps.store
    for one in (store, read):
        assert one.layer(5) is one.layers[0]
        with pytest.raises(CaptureError, match=rf"No attention layer is called '{names[1]}'"):
            one.layer(2)
