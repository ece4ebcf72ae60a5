"""What must hold for any attention: sums, symmetry, and independence of how the work is split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.ops.attention import column_means
from i2am_train.ops.grids import normalise
from i2am_train.ops.rows import head_mean_scores
from i2am_train.types import Direction, GridSize

few = settings(max_examples=30, deadline=None)
sizes = st.integers(1, 9)


@st.composite
def attentions(draw):
    """Projected tokens of [batch, head, token, channel] with logits from flat to extremely peaked."""
    batch, heads, generated, reference, channels = (draw(sizes) for _ in range(5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 300.0]))
    queries = torch.randn(batch, heads, generated, channels, generator=generator) * magnitude
    return queries, torch.randn(batch, heads, reference, channels, generator=generator)


@few
@given(attentions())
def test_both_maps_of_every_head_sum_to_one(attention):
    for mean in column_means(*attention):
        assert (mean >= 0).all()
        assert_close(mean.sum(-1), torch.ones(mean.shape[:2]), atol=1e-4, rtol=0)


@few
@given(attentions(), st.integers(1, 2000))
def test_the_byte_budget_changes_nothing(attention, byte_budget):
    whole, chunked = column_means(*attention), column_means(*attention, byte_budget=byte_budget)
    for one, other in zip(whole, chunked, strict=True):
        assert_close(one, other, atol=2e-4, rtol=0)


@few
@given(attentions())
def test_splitting_the_batch_changes_nothing(attention):
    whole = column_means(*attention)
    for row in range(attention[0].shape[0]):
        single = column_means(*(tokens[row : row + 1] for tokens in attention))
        for one, other in zip(whole, single, strict=True):
            assert_close(one[row], other[0], atol=2e-4, rtol=0)


@few
@given(attentions(), st.randoms(use_true_random=False))
def test_permuting_reference_tokens_permutes_their_map_and_leaves_the_other_alone(attention, random):
    generated, reference = attention
    order = list(range(reference.shape[2]))
    random.shuffle(order)
    before, after = (column_means(generated, reference), column_means(generated, reference[:, :, order]))
    assert_close(after.to_reference, before.to_reference[..., order], atol=2e-4, rtol=0)
    assert_close(after.to_generated, before.to_generated, atol=2e-4, rtol=0)


@few
@given(attentions())
def test_swapping_the_two_sides_swaps_the_two_maps(attention):
    generated, reference = attention
    one, other = column_means(generated, reference), column_means(reference, generated)
    assert_close(one.to_generated, other.to_reference, atol=2e-4, rtol=0)
    assert_close(one.to_reference, other.to_generated, atol=2e-4, rtol=0)


@few
@given(attentions())
def test_scores_average_to_the_reference_map(attention):
    scores = head_mean_scores(*attention)
    assert_close(scores.sum(-1), torch.ones(scores.shape[:2]))
    assert_close(scores.mean(1), column_means(*attention).to_reference.mean(1), atol=2e-4, rtol=0)


@few
@given(st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_means_over_heads_then_steps_are_those_over_all_at_once(steps, seed, data):
    groups = data.draw(st.integers(1, steps))
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, steps, 3, 6, generator=generator)
    layer = LayerRecord("layer", GridSize(3, 2), GridSize(2, 3), values, values)
    maps = AttributionMaps(AttributionStore((layer,), tuple(range(steps))))
    direction = Direction.GENERATED_TO_REFERENCE
    unified = maps.unified(direction).values
    assert_close(unified.flatten(1), values.mean(dim=(1, 2)))
    assert_close(maps.head_level(direction).values.mean(1), unified)
    if steps % groups == 0:
        assert_close(maps.time_level(direction, groups).values.mean(1), unified)


@few
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-10, 10))
def test_normalising_ignores_scale_and_offset_and_is_idempotent(seed, scale, offset):
    values = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    once = normalise(values)
    assert once.amin() == 0
    assert once.amax() == 1
    assert torch.equal(normalise(once), once)
    assert_close(normalise(values * scale + offset), once, atol=1e-9, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1 / 3, 5.0])
def test_a_constant_map_normalises_to_zeros(value):
    assert torch.equal(normalise(torch.full((2, 3, 5), value)), torch.zeros(2, 3, 5))
