"""attention/recipe.py and frames.py: names of layers, places of tokens, rows, announcements."""

import pytest
import torch

from i2am_train.attention.frames import Announcement, Caller, Frame, announce, announced_evaluation
from i2am_train.attention.known import diffusers_decoder
from i2am_train.attention.lookup import detect_recipe
from i2am_train.attention.recipe import PAPER_LAYERS, Recipe, Site, Tokens, find_layer, layer_name, paper_number
from i2am_train.errors import CaptureError
from i2am_train.types import Branch, GridSize

LATENT = GridSize(64, 48)


def frame(batch=4, announced=None, call=0, **caller):
    branch = caller.pop("branch", None)
    return Frame(call, None, LATENT, batch, announced, Caller(**caller), branch)


def test_paper_numbers_and_names_are_inverse():
    assert [paper_number(layer_name(number)) for number in range(1, 10)] == list(range(1, 10))
    assert layer_name(2) == "up_blocks.1.attentions.1"
    assert paper_number("mid_block.attentions.0") is None


@pytest.mark.parametrize("number", [0, 10, -1])
def test_a_number_outside_the_papers_is_an_error(number):
    with pytest.raises(CaptureError, match=rf"layer number {number}: .*1..9"):
        layer_name(number)


def test_a_layer_that_the_model_lacks_is_an_error_that_lists_those_it_has():
    with pytest.raises(CaptureError, match=r"'up_blocks.3.attentions.2'.*has: up_blocks.1.attentions.0 \(1\)"):
        find_layer(9, PAPER_LAYERS[:3])
    assert find_layer("up_blocks.1.attentions.2", PAPER_LAYERS) == PAPER_LAYERS[2]


def test_the_numbers_of_another_model_are_listed_and_count_all_its_layers():
    # four layers share nine numbers; of two that are captured, each keeps its own
    model = ["down.0", "up_blocks.0.a", "up_blocks.0.b", "up_blocks.1.a", "up_blocks.1.b"]
    captured = [model[2], model[0]]
    assert [find_layer(number, model) for number in range(1, 10)] == [
        *model[1:2] * 3,
        *model[2:3] * 2,
        *model[3:4] * 2,
        *model[4:] * 2,
    ]
    assert find_layer(5, captured, model) == "up_blocks.0.b"
    with pytest.raises(CaptureError, match=r"'which'\. This model has: up_blocks\.0\.b \(4-5\), down\.0\. Choose"):
        find_layer("which", captured, model)
    with pytest.raises(CaptureError, match=r"'up_blocks\.0\.a'.*up_blocks\.0\.b \(4-5\), down\.0\."):
        find_layer(1, captured, model)


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
    with pytest.raises(CaptureError, match="'second'; expected one of all, first_half, second_half"):
        Recipe("unet", (), rows="second")


def test_a_pattern_may_name_the_layer():
    site = diffusers_decoder(GridSize(5, 4)).sites[0]
    assert site.layer_of("up_blocks.1.attentions.1.transformer_blocks.0.attn2") == layer_name(2)
    assert site.layer_of("down_blocks.1.attentions.1.transformer_blocks.0.attn2") is None
    assert Site(r"blocks\.\d+\.attn").layer_of("blocks.3.attn") == "blocks.3.attn"


FIRST, SECOND, ALL = slice(0, 2), slice(2, 4), slice(0, 4)


@pytest.mark.parametrize("said", ["recipe", "caller"])
@pytest.mark.parametrize(
    ("rows", "guided", "expected"),
    [
        ("first_half", True, FIRST),
        ("second_half", True, SECOND),
        ("first_half", False, ALL),
        ("second_half", False, ALL),
        ("first_call", False, ALL),
        ("first_call", True, ALL),
    ],
)
def test_rows_of_the_conditional_branch(rows, guided, expected, said):
    # the batch is even with and without guidance: its size says nothing
    recipe = Recipe("", (), rows=rows, guided=guided if said == "recipe" else None)
    caller = {"guided": guided} if said == "caller" else {}
    assert recipe.conditional_rows(frame(**caller)) == expected
    second = recipe.conditional_rows(frame(call=1, **caller))
    assert second == (None if rows == "first_call" and guided else expected)


def test_rows_that_need_no_question():
    assert Recipe("", (), rows="all").conditional_rows(frame()) == ALL
    own = Recipe("", (), rows=lambda frame: slice(1, frame.batch))
    assert own.conditional_rows(frame(guided=True, samples=4)) == slice(1, 4)


@pytest.mark.parametrize(("branch", "expected"), [("conditional", ALL), ("unconditional", None)])
def test_calls_that_the_pipeline_names(branch, expected):
    recipe = Recipe("", (), rows="first_call")
    assert recipe.conditional_rows(frame(call=1, branch=Branch(branch))) == expected


@pytest.mark.parametrize("rows", ["first_half", "second_half", "first_call"])
def test_a_caller_that_says_nothing_is_asked_for_an_answer(rows):
    with pytest.raises(CaptureError, match=r"does not say whether.*rows='all'.*guided=True"):
        Recipe("", (), rows=rows).conditional_rows(frame())


@pytest.mark.parametrize(
    ("options", "said"), [({"guided": True}, False), ({"guided": False}, True), ({"rows": "all"}, True)]
)
def test_a_recipe_that_contradicts_the_pipeline_is_refused(options, said):
    with pytest.raises(CaptureError, match=r"recipe '' is with.*and the pipeline samples with"):
        Recipe("", (), **options).conditional_rows(frame(guided=said))


@pytest.mark.parametrize(
    ("guided", "samples", "rows"),
    [(True, 2, "second_half"), (False, 4, "second_half"), (True, 4, "first_call"), (False, 4, "all")],
)
def test_a_batch_that_guidance_does_not_explain_is_refused(guided, samples, rows):
    # perturbed attention guidance has a third part, pictures and words apart too
    recipe = Recipe("", (), rows=rows)
    recipe.conditional_rows(frame(guided=guided, samples=samples))
    for other in (6, 2 if guided and rows == "second_half" else 8):
        with pytest.raises(CaptureError, match=rf"{other} rows for {samples} samples; expected 4"):
            recipe.conditional_rows(frame(batch=other, guided=guided, samples=samples))


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
