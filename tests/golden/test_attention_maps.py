"""Golden vectors 06, 07 and 08: column means, unified map, time groups (see data/ for their provenance)."""

import json
from pathlib import Path

import pytest
import torch

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord, time_groups
from i2am_train.ops.attention import column_means, head_mean_matrices
from i2am_train.ops.grids import normalise, resize_maps, threshold
from i2am_train.types import Direction, GridSize, LayerWeighting

DATA = Path(__file__).parent / "data"
G2R, R2G = Direction.GENERATED_TO_REFERENCE, Direction.REFERENCE_TO_GENERATED


def load(name):
    return json.loads((DATA / name).read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def expected(golden, beginning):
    """The one expected value whose key begins so (keys carry remarks)."""
    (found,) = (value for key, value in golden["expected"].items() if key.startswith(beginning))
    return tensor(found)


class TestColumnMeans:
    """Golden 06: generated 4x3, reference 5x4 and a class token, two heads."""

    golden = load("06_attention_r2g_g2r_sram.json")
    generated = tensor(golden["inputs"]["q"])[None]
    tokens = tensor(golden["inputs"]["k"])[None]
    patches = tokens[:, :, 1:]

    def check(self, found, beginning):
        wanted = expected(self.golden, beginning)
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, atol=1e-12, rtol=0)

    def test_reference_to_generated_over_patches(self):
        means = column_means(self.generated, self.patches)
        self.check(means.to_generated, "R2G_column_mean_20_patches")

    def test_reference_to_generated_with_the_class_token_as_the_authors_do(self):
        means = column_means(self.generated, self.tokens)
        self.check(means.to_generated, "R2G_column_mean_all_21_tokens")

    def test_generated_to_reference_over_patches(self):
        means = column_means(self.generated, self.patches)
        self.check(means.to_reference, "G2R_column_mean_20_patches")

    def test_generated_to_reference_with_the_class_token_dropped_afterwards(self):
        means = column_means(self.generated, self.tokens)
        self.check(means.to_reference[..., 1:], "G2R_column_mean_cls_dropped_no_renorm")

    def test_generated_to_reference_inside_a_mask(self):
        mask = tensor(self.golden["inputs"]["query_mask"]).flatten()[None]
        means = column_means(self.generated, self.patches, generated_weights=mask)
        self.check(means.to_reference, "G2R_query_masked_divided_by_mask_count")
        share = mask.mean()
        key = "G2R_query_masked_divided_by_all_12 [head,5,4] (authors_code_v2)"
        self.check(means.to_reference * share, key)

    def test_specific_reference_and_its_reverse(self):
        matrices = head_mean_matrices(self.generated, self.patches)
        row = matrices.over_reference[0, self.golden["inputs"]["sram_index"]]
        column = matrices.over_generated[0, :, self.golden["inputs"]["reverse_sram_index"]]
        self.check(row, "SRAM_i7_head_mean_20_patches (default)")
        self.check(2 * row, "SRAM_i7_head_sum_20_patches")
        self.check(column, "reverse_SRAM_j9_head_mean (default)")

    def test_daams_direction_is_constant(self):
        scores = head_mean_matrices(self.generated, self.tokens).over_reference.mean(dim=-1)
        constant = expected(self.golden, "DAAM_direction")
        torch.testing.assert_close(scores[0], constant[0].flatten(), atol=1e-12, rtol=0)

    def test_specific_reference_maps_find_the_patch_by_row_and_column(self):
        matrices = head_mean_matrices(self.generated, self.patches)
        means = column_means(self.generated, self.patches)
        record = LayerRecord(
            "layer", GridSize(4, 3), GridSize(5, 4), means.to_generated[:, None],
            means.to_reference[:, None], True, *matrices,
        )  # fmt: skip
        maps = AttributionMaps(AttributionStore((record,), (999.0,)))
        patch = maps.specific_reference([(2, 1)], "layer").values
        self.check(patch, "SRAM_i7_head_mean_20_patches (default)")
        reverse = maps.reverse_specific_reference([9], "layer").values
        self.check(reverse, "reverse_SRAM_j9_head_mean (default)")


class TestUnifiedMap:
    """Golden 07: two layers, two steps, two heads, three tokens each; bicubic, clamp, min-max, threshold."""

    golden = load("07_ulam_resize_normalise_threshold.json")
    layers = tensor(golden["inputs"]["layer_a"]), tensor(golden["inputs"]["layer_b"])

    def authors_unified(self, balanced=False):
        """The authors' order on the primitives of this package: every token resized and clamped, then the mean."""
        common = GridSize(8, 6)
        resized = []
        for layer in self.layers:
            over_time = layer.sum(dim=0)
            density = layer.shape[-2] * layer.shape[-1] / common.tokens if balanced else 1.0
            tokens = resize_maps(over_time * density, common, "bicubic").clamp(min=0)
            resized.append(tokens.mean(dim=1))
        return torch.stack(resized).mean(dim=(0, 1))

    def check(self, found, name):
        torch.testing.assert_close(found, expected(self.golden, name), atol=1e-9, rtol=0)

    def test_authors_pipeline(self):
        unified = self.authors_unified()
        self.check(unified, "unified_before_norm")
        unified = normalise(unified, epsilon=1e-8)
        self.check(unified, "unified_norm")
        final = normalise(resize_maps(unified, GridSize(16, 12), "bicubic"), epsilon=1e-8)
        self.check(final, "final_norm")
        self.check(threshold(final, self.golden["inputs"]["delta"]), "final_thresholded")

    def test_mass_balanced_option(self):
        unified = normalise(self.authors_unified(balanced=True), epsilon=1e-8)
        self.check(unified, "option_mass_balanced_unified_norm")

    @pytest.mark.parametrize("weighting", list(LayerWeighting))
    def test_maps_from_averaged_tokens_are_the_authors_up_to_their_clamp(self, weighting):
        # bicubic undershoot is clipped per token by the authors, per layer here: a few per cent
        records = tuple(
            LayerRecord(
                name, GridSize(*layer.shape[-2:]), None,
                layer.mean(dim=2).flatten(-2)[None], torch.zeros(1, 2, 2, 3, dtype=torch.float64),
            )
            for name, layer in zip("ab", self.layers, strict=True)
        )  # fmt: skip
        maps = AttributionMaps(AttributionStore(records, (999.0, 500.0)))
        ours = maps.unified(R2G, weighting, mode="bicubic").normalised().values[0]
        balanced = weighting is LayerWeighting.DENSITY
        authors = normalise(self.authors_unified(balanced))
        assert (ours - authors).abs().max() < 0.05

    def test_threshold_is_strict(self):
        case = self.golden["threshold_edge_case"]
        found = threshold(tensor(case["input"]), case["delta"])
        torch.testing.assert_close(found, tensor(case["expected_strict_greater"]), atol=0, rtol=0)


class TestTimeGroups:
    """Golden 08: disjoint groups in sampling order, group 0 noisiest."""

    golden = load("08_tlam_grouping.json")

    @pytest.mark.parametrize(("case", "groups"), [("T50_G5", 5), ("T20_G4", 4)])
    def test_groups_and_their_sums(self, case, groups):
        wanted = self.golden["expected"][case]
        values = tensor(wanted["value_at_sampling_step_s"])
        runs = time_groups(len(values), groups)
        group_of_step = [group for group, run in enumerate(runs) for _ in range(run.start, run.stop)]
        assert group_of_step == wanted["group_of_step_s"]
        sums = [float(values[run].sum()) for run in runs]
        assert sums == wanted["authors_code_and_default_group_sums"]
        literal = next(value for key, value in wanted.items() if key.startswith("paper_eq11"))
        assert sums != literal

    @pytest.mark.parametrize(("case", "groups"), [("T50_G5", 5), ("T20_G4", 4)])
    def test_time_level_maps_hold_the_means_of_the_groups(self, case, groups):
        wanted = self.golden["expected"][case]
        values = tensor(wanted["value_at_sampling_step_s"])
        steps = values[None, :, None, None].expand(2, -1, 3, 6).clone()
        record = LayerRecord("layer", GridSize(3, 2), GridSize(2, 3), steps, steps)
        maps = AttributionMaps(AttributionStore((record,), tuple(range(len(values), 0, -1))))
        found = maps.time_level(R2G, groups).values
        means = tensor(wanted["authors_code_and_default_group_sums"]) / (len(values) // groups)
        torch.testing.assert_close(found, means[None, :, None, None].expand(2, -1, 3, 2))
        assert maps.time_level(G2R, groups).grid == GridSize(2, 3)
