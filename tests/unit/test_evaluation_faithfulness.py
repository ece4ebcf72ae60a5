"""Faithfulness of models whose answer is known: what is copied from where, and what a layer is worth."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.attention import Recipe, Site, Tokens, announce, trace, uniform_attention
from i2am_train.config.evaluation import AttributionConfig, FaithfulnessConfig
from i2am_train.errors import CaptureError
from i2am_train.evaluation.faithfulness import Remake, check_faithfulness, faithfulness
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


@pytest.fixture
def plain() -> Tensor:
    """Two garments of one colour each: a white patch is a change of .8 and of .5 wherever it is shown."""
    return torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.5)])


def test_a_faithful_map(plain: Tensor) -> None:
    """Its top half is all that is shown, its lower half nothing; where it says is where the image changes."""
    options = FaithfulnessConfig(shares=[0.25, 0.5], fill="white", random_draws=4)
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
    options = FaithfulnessConfig(layers=["idle"], shares=[0.5], fill="white", random_draws=1)
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
    options = FaithfulnessConfig(layers=["copies"], shares=[0.25], fill="white", random_draws=1)
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
    options = FaithfulnessConfig(layers=["copies"], shares=[0.5], random_draws=1)
    known, unknown = faithfulness(remake(Copier(), plain, correspondence=truth, worn=worn), options)
    assert known["deletion/truth"] is not None
    assert {unknown[name] for name in ("deletion/truth", "deletion/truth@0.5", "where/truth")} == {None}


@pytest.mark.parametrize("via", ["projections", "sdpa"])
def test_use(via: str) -> None:
    """A layer without a choice shows the mean colour everywhere; one that is thrown away changes nothing."""
    reference = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2)
    reference = reference.repeat_interleave(4, 3)
    subject = remake(Copier(kernel=via == "sdpa"), reference, recipe=recipe(via))
    rows = faithfulness(subject, FaithfulnessConfig(shares=[0.5], random_draws=1))
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
        faithfulness(subject, FaithfulnessConfig())
    with pytest.raises(CaptureError, match=r"no patches that could be deleted .*grids: none"):
        check_faithfulness(subject.target, single, FaithfulnessConfig(), AttributionConfig())
    with pytest.raises(CaptureError, match=r"No attention layer is called 'else'.*copies, idle"):
        faithfulness(remake(Copier(), plain), FaithfulnessConfig(layers=["else"]))


def test_random_draws_are_the_samples_own(plain: Tensor) -> None:
    """A sample's row is the same alone and in a batch."""
    options = FaithfulnessConfig(shares=[0.5], random_draws=2)
    subject = remake(Copier(), plain)
    alone = remake(Copier(), plain[1:], indices=[1])
    assert faithfulness(subject, options)[1] == faithfulness(alone, options)[0]
