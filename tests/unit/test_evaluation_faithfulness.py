"""Faithfulness of models whose answer is known: what is copied from where, and what a layer is worth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.attention import Recipe, Site, Tokens, announce, trace, uniform_attention
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.store import AttributionStore, LayerRecord
from i2am_train.config.evaluation import AttributionConfig, FaithfulnessConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.evaluation.faithfulness import (
    check_faithfulness,
    faithfulness,
    map_importance,
    perceptual_change,
    runs_of,
)
from i2am_train.evaluation.remaking import Remake, remake_of, token_sensitivity
from i2am_train.metrics.registry import image_pair_score
from i2am_train.models import sampling
from i2am_train.ops.numerics import to_unit
from i2am_train.seeds import seed_for
from i2am_train.types import GridSize

GRID = GridSize(4, 4)
COPIED = torch.arange(16) // 2
"""Generated patch i shows reference patch i // 2: the upper half of the reference is used, the lower half never."""


class Look(nn.Module):
    """Attention that looks at one given reference patch."""

    heads = 1

    def __init__(self, sees: Tensor, kernel: bool) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Identity(), nn.Identity()
        self.register_buffer("queries", F.one_hot(sees, 16).float() * 200)
        self.kernel = kernel

    def forward(self, colours: Tensor) -> Tensor:
        rows = len(colours)
        q, k = self.to_q(self.queries.expand(rows, -1, -1)), self.to_k(torch.eye(16).expand(rows, -1, -1))
        if self.kernel:
            return F.scaled_dot_product_attention(q[:, None], k[:, None], colours[:, None])[:, 0]
        return (q @ k.mT / 4).softmax(-1) @ colours


class Copier(nn.Module):
    """Shows the colours that one layer fetches; another layer's are thrown away."""

    def __init__(self, kernel: bool = False) -> None:
        super().__init__()
        self.copies, self.idle = Look(COPIED, kernel), Look(COPIED.flip(0), kernel)

    def forward(self, sample: Tensor, colours: Tensor) -> Tensor:
        return self.copies(colours) + 0 * self.idle(colours)


def recipe(via: str = "projections", rows: str = "all") -> Recipe:
    places = Tokens(GRID)
    return Recipe("", (Site("copies|idle", generated=places, reference=places, via=via),), timestep=None, rows=rows)


def remake(net: Copier, reference: Tensor, **changes: object) -> Remake:
    """Images of 16x16 whose patches are the colours that the net fetched, once."""

    def make(pictures: Tensor) -> Tensor:
        colours = F.adaptive_avg_pool2d(pictures, (4, 4)).flatten(2).mT
        with announce(step_index=0, conditional_rows=slice(0, len(pictures))):
            fetched = net(torch.zeros(len(pictures), 1, 4, 4), colours)
        return F.interpolate(fetched.mT.reshape(-1, 3, 4, 4), (16, 16), mode="nearest")

    given = {
        "target": net, "recipe": recipe(), "names": ["a"] * len(reference), "indices": list(range(len(reference))),
        "reference": reference, "make": make,
        "garment": torch.ones(len(reference), 16, 16, dtype=torch.bool),
        "mask": torch.ones(len(reference), 16, 16, dtype=torch.bool),
    }  # fmt: skip
    return Remake(**{**given, **changes})  # type: ignore[arg-type]


def asked(**options: Any) -> FaithfulnessConfig:
    """Options for images of 16x16, which are too small for a perceptual network."""
    return FaithfulnessConfig(**{"perceptual": None, "controls": ["random"], **options})


@pytest.fixture
def plain() -> Tensor:
    """Two garments of one colour each: a white patch is a change of .8 and of .5 wherever it is shown."""
    return torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.5)])


def test_a_faithful_map(plain: Tensor) -> None:
    """Its top half is all that is shown, its lower half nothing; where it says is where the image changes."""
    options = asked(shares=[0.25, 0.5], fill="white", random_draws=4)
    rows = faithfulness(remake(Copier(), plain), options)
    for row, change in zip(rows, (0.8, 0.5), strict=True):
        assert row["deletion/top@0.5"] == pytest.approx(change)
        assert row["deletion/top@0.25"] == pytest.approx(change / 2)
        assert row["deletion/bottom@0.5"] == 0
        assert 0 < row["deletion/random@0.5"] < change
        assert row["insertion/top@0.5"] == 0
        assert row["deletion/score"] == pytest.approx(change / 2)  # under a straight line
        assert row["where/copies"] == pytest.approx(1.0)


def test_an_unfaithful_map_is_told_apart(plain: Tensor) -> None:
    """Asked of the layer whose reading is thrown away, with a map that points at the patches that are not used."""
    net = Copier()
    net.idle.queries = F.one_hot(15 - COPIED, 16).float() * 200
    options = asked(layers=["idle"], shares=[0.5], fill="white", random_draws=1)
    (row, _) = faithfulness(remake(net, plain), options, AttributionConfig(layers=["idle"]))
    assert row["use/idle"] == 0
    assert row["deletion/top@0.5"] == 0
    assert row["deletion/score"] == pytest.approx(-0.4)
    assert row["where/idle"] is None or row["where/idle"] <= 0
    assert not {"use/all", "where/all"} & set(row), "of one layer: the same again"


def test_the_map_averages_over_the_mask(plain: Tensor) -> None:
    """What the masked positions look at comes first; over all positions, none does."""
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, 8:] = True  # generated patches 8 to 15, which show the reference's 4 to 7
    options = asked(layers=["copies"], shares=[0.25], fill="white", random_draws=1)
    subject = remake(Copier(), plain, mask=mask)
    (inside, _) = faithfulness(subject, options, AttributionConfig(layers=["copies"]))
    assert inside["deletion/top@0.25"] == pytest.approx(0.8)
    (over_all, _) = faithfulness(subject, options, AttributionConfig(layers=["copies"], inpaint_queries=False))
    assert over_all["deletion/top@0.25"] == 0  # of equals, the first four


def test_no_truth_has_no_ranking(plain: Tensor) -> None:
    """A sample whose true positions are unknown has no value, and never that of some order."""
    rows = torch.arange(16).repeat_interleave(1)[:, None].expand(16, 16) / 16
    truth = torch.stack([rows + 1 / 32, rows.mT + 1 / 32], dim=-1).repeat(2, 1, 1, 1)
    truth[1] = torch.nan
    worn = torch.ones(2, 16, 16, dtype=torch.bool)
    options = asked(layers=["copies"], shares=[0.5], controls=["truth"])
    known, unknown = faithfulness(remake(Copier(), plain, correspondence=truth, worn=worn), options)
    assert known["deletion/truth"] is not None
    assert {unknown[name] for name in ("deletion/truth", "deletion/truth@0.5", "where/truth")} == {None}


@pytest.mark.parametrize("via", ["projections", "sdpa"])
def test_use(via: str) -> None:
    """A layer without a choice shows the mean colour everywhere; one that is thrown away changes nothing."""
    reference = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2)
    reference = reference.repeat_interleave(4, 3)
    subject = remake(Copier(kernel=via == "sdpa"), reference, recipe=recipe(via))
    rows = faithfulness(subject, asked(shares=[0.5], random_draws=1))
    colours = F.adaptive_avg_pool2d(reference, (4, 4)).flatten(2)
    expected = (colours[:, :, COPIED] - colours.mean(dim=2, keepdim=True)).abs().mean(dim=(1, 2))
    for row, change in zip(rows, expected, strict=True):
        assert row["use/copies"] == pytest.approx(float(change), abs=1e-6)
        assert row["use/idle"] == 0
        assert row["use/all"] == row["use/copies"]


def test_unconditional_rows_keep_their_choice(plain: Tensor) -> None:
    """Only rows that see the reference are changed; outside the block none is."""
    net = Copier()
    colours = torch.rand(2, 16, 3, generator=torch.Generator().manual_seed(0))
    sample = torch.zeros(2, 1, 4, 4)
    before = net(sample, colours)
    with uniform_attention(net, recipe()), announce(step_index=0, conditional_rows=slice(1, 2)):
        within = net(sample, colours)
    torch.testing.assert_close(within[0], before[0])
    torch.testing.assert_close(within[1], colours[1].mean(dim=0).expand(16, 3))
    assert torch.equal(net(sample, colours), before)


def test_the_try_on_model_against_a_slow_version(make_small_model, read_batch) -> None:  # type: ignore[no-untyped-def]
    """Uniform attention of a U-Net's layer is what it gives for a context whose tokens are all their mean."""
    model = make_small_model().eval()
    batch = read_batch([0, 1])
    tokens = model.encode_reference(batch["garment"])
    noisy, timesteps = torch.randn(2, 12, *model.latent_size), torch.tensor([700, 700])
    attention = model.unet.get_submodule("up_blocks.2.attentions.1.transformer_blocks.0.attn2")

    def mean_context(_, args, kwargs):  # type: ignore[no-untyped-def]
        context = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": context.mean(dim=1, keepdim=True).expand_as(context)}

    with torch.no_grad():
        plainly = model.unet(noisy, timesteps, tokens).sample
        handle = attention.register_forward_pre_hook(mean_context, with_kwargs=True)
        expected = model.unet(noisy, timesteps, tokens).sample
        handle.remove()
        with uniform_attention(model, layers=[5]), announce(step_index=0, conditional_rows=slice(0, 2)):
            found = model.unet(noisy, timesteps, tokens).sample
        assert torch.equal(model.unet(noisy, timesteps, tokens).sample, plainly)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plainly).abs().max() > 1e-5


def test_trace_and_uniform_attention_together() -> None:
    """A trace inside the block sees the attention as it is: uniform."""
    net, colours = Copier(), torch.rand(1, 16, 3)
    with (
        uniform_attention(net, recipe(), layers=["copies"]),
        trace(net, recipe(), matrix_layers=None) as attention,
        announce(step_index=0, conditional_rows=slice(0, 1)),
    ):
        net(torch.zeros(1, 1, 4, 4), colours)
    maps = attention.maps()
    torch.testing.assert_close(maps.scores("copies"), torch.full((1, 16, 16), 1 / 16))
    assert maps.scores("idle").amax() > 0.9


def test_what_is_refused(plain: Tensor) -> None:
    """No patches to delete, and layers that do not exist."""
    single = Recipe(
        "", (Site("copies|idle", generated=Tokens(GRID), reference=Tokens(None)),), timestep=None, rows="all"
    )
    subject = remake(Copier(), plain, recipe=single)
    with pytest.raises(CaptureError, match="no patches that could be deleted"):
        faithfulness(subject, asked())
    with pytest.raises(CaptureError, match=r"no patches that could be deleted .*grids: none"):
        check_faithfulness(subject.target, single, asked(), AttributionConfig(layer=2), 1)
    with pytest.raises(CaptureError, match=r"No attention layer is called 'else'.*copies .*idle"):
        faithfulness(remake(Copier(), plain), asked(layers=["else"]))


def test_attention_that_is_no_number(plain: Tensor) -> None:
    """Refused, with the layer; and a head that only the call could show not to be there, too."""
    net = Copier()
    net.idle.queries = torch.full((16, 16), torch.nan)
    with pytest.raises(CaptureError, match="not finite numbers, first seen in the attention of layer idle"):
        faithfulness(remake(net, plain), asked())
    kernel = remake(Copier(kernel=True), plain, recipe=recipe("sdpa"))
    with pytest.raises(ConfigError, match="head=1 is not possible: expected less than 1"):
        faithfulness(kernel, asked(head=1))


def test_random_draws_are_the_samples_own(plain: Tensor) -> None:
    """A sample's row is the same alone and in a batch."""
    options = asked(shares=[0.5], random_draws=2)
    subject = remake(Copier(), plain)
    alone = remake(Copier(), plain[1:], indices=[1])
    assert faithfulness(subject, options)[1] == faithfulness(alone, options)[0]


@pytest.mark.parametrize(("points_at", "expected"), [(slice(0, 8), 0.8), (slice(8, 16), 0.0)])
def test_gradient_controls(plain: Tensor, points_at: slice, expected: float) -> None:
    """They are rankings like the map's; times the map, what the map does not see comes last, whatever its gradient."""
    sensitivity = torch.full((2, 16), 0.1)
    sensitivity[:, points_at] = 1.0
    subject = remake(Copier(), plain, sensitivity=lambda: sensitivity)
    options = asked(shares=[0.5], fill="white", controls=["gradient", "gradient_attention"])
    made = []
    (row, _) = faithfulness(subject, options, AttributionConfig(layers=["copies"]), lambda: made.append(1))
    assert row["deletion/gradient@0.5"] == pytest.approx(expected)
    assert row["deletion/gradient_attention@0.5"] == pytest.approx(0.8)
    assert "deletion/random" not in row
    assert len(made) == runs_of(options, layers=2)


def test_single_patches(plain: Tensor) -> None:
    """Where patch i looks is all of it: without that patch it is white, without any other it stays."""
    one = {"shares": [1 / 16], "fill": "white"}
    (chosen, _) = faithfulness(remake(Copier(), plain), asked(generated_patches=[(0, 3), (2, 1)], **one),
                               AttributionConfig(layer="copies"))  # fmt: skip
    assert chosen["patch/top@0.0625"] == pytest.approx(0.8)
    assert chosen["patch/bottom@0.0625"] == 0
    assert chosen["patch/score"] == pytest.approx(0.4)  # under a straight line from 0
    (idle, _) = faithfulness(
        remake(Copier(), plain), asked(generated_patches=3, **one), AttributionConfig(layer="idle")
    )
    assert idle["patch/top@0.0625"] == 0, "patch i looks elsewhere in this layer than it is made of"
    empty = torch.zeros(2, 16, 16, dtype=torch.bool)
    empty[1] = True
    options = asked(generated_patches=2, **one)
    none, some = faithfulness(remake(Copier(), plain, mask=empty), options, AttributionConfig(layer="copies"))
    assert none["patch/top"] is None
    assert some["patch/top@0.0625"] == pytest.approx(0.5)


def test_the_map_is_any(plain: Tensor) -> None:
    """A head, a group of steps and both directions against sums in loops."""
    draw = torch.Generator().manual_seed(0)
    grids = {"a": (GridSize(2, 3), GridSize(4, 4)), "b": (GridSize(4, 3), GridSize(4, 4))}
    records = []
    for name, (generated, reference) in grids.items():
        to_reference = torch.rand(2, 4, 3, reference.tokens, generator=draw)
        over_generated = torch.rand(2, generated.tokens, reference.tokens, generator=draw).softmax(dim=1)
        even = torch.ones(2, 4, 3, generated.tokens)
        records.append(
            LayerRecord(name, generated, reference, even, to_reference, True, over_generated, over_generated)
        )
    maps = AttributionMaps(AttributionStore(tuple(records), (None,) * 4))
    mask = torch.rand(2, 8, 6, generator=draw) > 0.4
    options, attribution = FaithfulnessConfig(head=2, time_group=1), AttributionConfig(time_groups=2)
    expected = sum(record.to_reference[:, 2:4, 2].mean(dim=1) for record in records) / 2
    torch.testing.assert_close(map_importance(maps, mask, options, attribution), expected)
    only = map_importance(maps, mask, FaithfulnessConfig(), AttributionConfig(layers=["b"]))
    torch.testing.assert_close(only, records[1].to_reference.mean(dim=(1, 2)))
    fed = map_importance(maps, mask, FaithfulnessConfig(direction="reference_to_generated"), AttributionConfig(layer=2))
    slow = torch.zeros(2, 16)
    for record in records:
        cell = 8 // record.generated_grid.height, 6 // record.generated_grid.width
        for sample in range(2):
            for at in range(record.generated_grid.tokens):
                y, x = divmod(at, record.generated_grid.width)
                part = mask[sample, y * cell[0] : (y + 1) * cell[0], x * cell[1] : (x + 1) * cell[1]]
                if part.float().mean() >= 0.5:
                    slow[sample] += record.scores_over_generated[sample, at] / 2
    torch.testing.assert_close(fed, slow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 1}, r"head=1 is not possible: expected less than 1"),
        ({"time_group": 2}, r"time_group=2 is not possible: expected less than attribution.time_groups=2"),
        ({"head": 0, "direction": "reference_to_generated"}, "head=0 is not possible: expected null with direction"),
        ({"controls": ["random", "random"]}, "names nothing twice"),
    ],
)
def test_maps_that_do_not_exist(plain: Tensor, options: dict[str, Any], message: str) -> None:
    """Refused before an image is made."""
    with pytest.raises(ConfigError, match=message):
        check_faithfulness(Copier(), recipe(), asked(**options), AttributionConfig(time_groups=2), 4)


def test_perceptual_change_is_of_the_mask() -> None:
    """That of the pair whose other half is pasted outside, so that only the mask counts; an empty one has no value."""
    draw = torch.Generator().manual_seed(0)
    image, other = torch.rand(2, 3, 40, 32, generator=draw), torch.rand(2, 3, 40, 32, generator=draw)
    mask = torch.zeros(2, 40, 32, dtype=torch.bool)
    mask[0, 5:30, 4:20] = True
    found = perceptual_change(image, other, mask, "stlpips")
    pasted = image.clone()
    pasted[0, :, 5:30, 4:20] = other[0, :, 5:30, 4:20]
    as_bytes = ((one * 255).round().to(torch.uint8) for one in (image, pasted))
    assert found[0] == image_pair_score("stlpips")(*as_bytes)[0]
    assert found[0] > 0.01
    assert found[1].isnan()


def test_what_does_not_change_is_encoded_once(make_small_model, read_batch, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Images made again are bit by bit those of a sampling of their own; of the person nothing is encoded anew."""
    model, batch, options = make_small_model().eval(), read_batch([0, 1]), SamplingConfig(steps=2, guidance=2.0)

    def sampled(garment: Tensor) -> Tensor:
        seeds = [seed_for(0, "sampling", index) for index in (0, 1)]
        made = sampling.sample(
            model, garment, batch["agnostic"], batch["densepose"], seeds=seeds, steps=2, guidance=2.0
        )
        return to_unit(made)

    grey = (batch["garment"] + 1) / 4
    expected = [sampled(batch["garment"]), sampled(grey * 2 - 1), sampled(batch["garment"])]
    encoded: list[str] = []

    def counting(name: str, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda pictures: encoded.append(name) or encode(pictures)  # type: ignore[func-returns-value]

    for name in ("encode_latents", "encode_reference"):
        monkeypatch.setattr(model, name, counting(name, getattr(model, name)))
    remake = remake_of(model, batch, options)
    found = [remake.make(one) for one in (remake.reference, grey, remake.reference)]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[1])
    assert encoded == ["encode_latents", "encode_latents", "encode_reference", "encode_reference"]


def test_sensitivity_is_the_norm_of_the_jacobian(make_small_model, read_batch, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Of a denoiser whose prediction at cell j is w_j times a channel of token j: |w_j| inside the mask, 0 outside."""
    model, batch = make_small_model().eval(), read_batch([0, 1])
    tokens = model.reference_grid.tokens
    weight = torch.linspace(0.5, 2, tokens)
    batch["inpaint_mask"] = torch.zeros_like(batch["inpaint_mask"])
    batch["inpaint_mask"][0] = True
    asked_at = []

    def denoise(noisy: Tensor, timesteps: Tensor, conditions, call=None) -> Tensor:  # type: ignore[no-untyped-def]
        asked_at.append(int(timesteps[0]))
        made = torch.zeros_like(noisy).flatten(2)
        made[:, 1, :tokens] = conditions.tokens[..., 3] * weight
        return made.reshape(noisy.shape)

    monkeypatch.setattr(model, "denoise", denoise)
    assert model.latent_size.tokens >= tokens
    found = token_sensitivity(model, batch, SamplingConfig(steps=3, guidance=2.0))
    torch.testing.assert_close(found, torch.stack([weight, torch.zeros(tokens)]))
    assert asked_at[::2] == asked_at[1::2], "each step's own time"
    assert len(set(asked_at)) == 3


def test_sensitivity_in_the_inference_mode_of_lightning(make_small_model, read_batch) -> None:  # type: ignore[no-untyped-def]
    """An evaluation measures its controls within `trainer.test`, whose tensors are made in inference mode, too."""
    model, batch, options = make_small_model().eval(), read_batch([0, 1]), SamplingConfig(steps=2, guidance=2.0)
    with torch.inference_mode():
        moved = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
        found = token_sensitivity(model, moved, options)
    assert moved["garment"].is_inference()
    torch.testing.assert_close(found, token_sensitivity(model, batch, options), rtol=0, atol=0)
    assert found.min() > 0
