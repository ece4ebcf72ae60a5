"""attribution/sites.py and frames.py: names of layers, places of tokens, rows, announcements."""

import pytest
import torch

from i2am_train.attribution.frames import Announcement, Frame, announce, announced_evaluation
from i2am_train.attribution.recipes import (
    detect_recipe,
    diffusers_decoder,
)
from i2am_train.attribution.sites import (
    PAPER_LAYERS,
    Recipe,
    Site,
    Tokens,
    find_layer,
    layer_name,
    paper_number,
)
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize

LATENT = GridSize(64, 48)


def frame(batch=4, announced=None):
    return Frame(call=0, timestep=None, latent=LATENT, batch=batch, announced=announced)


def test_paper_numbers_and_names_are_inverse():
    assert [paper_number(layer_name(number)) for number in range(1, 10)] == list(range(1, 10))
    assert layer_name(2) == "up_blocks.1.attentions.1"
    assert paper_number("mid_block.attentions.0") is None


@pytest.mark.parametrize("number", [0, 10, -1])
def test_a_number_outside_the_papers_is_an_error(number):
    with pytest.raises(CaptureError, match=rf"layer number {number}: .*1..9"):
        layer_name(number)


def test_a_layer_that_the_model_lacks_is_an_error_that_lists_those_it_has():
    with pytest.raises(
        CaptureError, match=r"'up_blocks.3.attentions.2'.*has: up_blocks.1.attentions.0 \(1\)"
    ):
        find_layer(9, PAPER_LAYERS[:3])
    assert find_layer("up_blocks.1.attentions.2", PAPER_LAYERS) == PAPER_LAYERS[2]


def test_latent_tokens_are_solved_from_the_latent_not_from_a_square_root():
    places = Tokens().places(32 * 24, LATENT)
    assert (places.grid, places.index) == (GridSize(32, 24), slice(0, 768))


def test_special_tokens_are_skipped():
    places = Tokens(GridSize(37, 28), skip=1).places(1037, LATENT)
    assert (places.count, places.index) == (1036, slice(1, 1037))


def test_tokens_that_do_not_fill_the_grid_are_an_error():
    with pytest.raises(CaptureError, match=r"1037 tokens \(without the special ones\).*37x28"):
        Tokens(GridSize(37, 28)).places(1037, LATENT)


def test_blocks_cut_a_concatenated_sequence():
    # IDM-VTON: generated tokens in the first half of the sequence, reference tokens in the second
    generated = Tokens(block=(0, 2)).places(2 * 192, LATENT)
    reference = Tokens(block=(1, 2)).places(2 * 192, LATENT)
    assert (generated.index, reference.index) == (slice(0, 192), slice(192, 384))
    assert generated.grid == reference.grid == GridSize(16, 12)


def test_crops_cut_a_concatenated_canvas():
    # CatVTON side by side: the two halves of every row interleave in the sequence
    canvas = GridSize(4, 6)
    right = Tokens(crop=(0, 1, 0.5, 1)).places(24, canvas)
    assert right.grid == GridSize(4, 3)
    assert right.index.tolist() == [row * 6 + column for row in range(4) for column in (3, 4, 5)]
    taken = right.take(torch.arange(48).reshape(2, 24, 1))
    assert taken[1, :3, 0].tolist() == [27, 28, 29]


def test_unknown_words_in_a_recipe_are_errors():
    with pytest.raises(CaptureError, match="'square'; expected a GridSize, 'latent' or None"):
        Tokens("square")
    with pytest.raises(
        CaptureError, match="'second'; expected one of all, first_half, second_half"
    ):
        Recipe("unet", (), rows="second")


def test_a_pattern_may_name_the_layer():
    site = diffusers_decoder(GridSize(5, 4)).sites[0]
    assert site.layer_of("up_blocks.1.attentions.1.transformer_blocks.0.attn2") == layer_name(2)
    assert site.layer_of("down_blocks.1.attentions.1.transformer_blocks.0.attn2") is None
    assert Site(r"blocks\.\d+\.attn").layer_of("blocks.3.attn") == "blocks.3.attn"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("all", slice(0, 4)),
        ("first_half", slice(0, 2)),
        ("second_half", slice(2, 4)),
        (lambda frame: slice(1, frame.batch), slice(1, 4)),
    ],
)
def test_rows_of_the_conditional_branch(rows, expected):
    assert Recipe("", (), rows=rows).conditional_rows(frame()) == expected


def test_an_announcement_comes_before_the_recipe():
    announced = Announcement(3, slice(0, 1))
    assert Recipe("", ()).conditional_rows(frame(announced=announced)) == slice(0, 1)
    assert Recipe("", ()).conditional_rows(frame(announced=Announcement(3, None))) is None


def test_announcements_nest_and_end_with_their_block():
    with announce(step_index=1, conditional_rows=slice(0, 2)):
        with pytest.raises(KeyError, match="inner"), announce(step_index=2, conditional_rows=None):
            raise KeyError("inner")
        assert announced_evaluation() == Announcement(1, slice(0, 2))
    assert announced_evaluation() is None


@pytest.mark.parametrize("timestep", [torch.tensor([981, 981]), torch.tensor(981.0), 981])
def test_timesteps_are_read_in_all_their_forms(timestep):
    assert Frame(0, timestep, LATENT, 2).read_timestep() == 981.0


def test_known_pipelines_need_no_recipe():
    class PaintByExamplePipeline:
        unet = torch.nn.Conv2d(9, 4, 3)

    recipe = detect_recipe(PaintByExamplePipeline())
    assert recipe.root == "unet"
    assert recipe.sites[0].reference.grid is None
