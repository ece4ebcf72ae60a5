"""A diagnosis of models whose answer is known: a layer that copies, one that scatters, and one that nobody hears."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.attention import Recipe, Site, Tokens, announce
from i2am_train.config.evaluation import AttributionConfig, DiagnosisConfig, FaithfulnessConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.errors import CaptureError
from i2am_train.evaluation.diagnosis import diagnosis, images_of, layer_heads
from i2am_train.evaluation.explaining import explain_batch
from i2am_train.evaluation.faithfulness import faithfulness
from i2am_train.evaluation.remaking import Remake, remake_of
from i2am_train.reporting.diagnosis import HEADS, diagnosed, diagnosis_tables, layer_table, repair, verdict_sentences
from i2am_train.reporting.diagnosis_page import diagnosis_page
from i2am_train.types import GridSize

GRID = GridSize(4, 3)
OWN = torch.arange(12)
SCATTERED = torch.tensor([7, 2, 9, 4, 11, 0, 5, 10, 1, 8, 3, 6])


class Look(nn.Module):
    """Attention of two heads, each of which looks at one given patch; the second is not heard."""

    heads = 2

    def __init__(self, sees: Tensor) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Identity(), nn.Identity()
        sharp = F.one_hot(sees, 12).float() * 200
        self.register_buffer("queries", torch.cat([sharp, sharp.flip(0)], dim=1))

    def forward(self, colours: Tensor) -> Tensor:
        rows = len(colours)
        q, k = self.to_q(self.queries.expand(rows, -1, -1)), self.to_k(torch.eye(12).repeat(1, 2).expand(rows, -1, -1))
        q, k = (tokens.unflatten(2, (2, 12)).transpose(1, 2) for tokens in (q, k))
        return (q @ k.mT / 12**0.5).softmax(-1)[:, 0] @ colours


class Net(nn.Module):
    """Shows three quarters of what one layer fetches and a quarter of what another does; the third is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.scatters, self.dead = Look(OWN), Look(SCATTERED), Look(SCATTERED)

    def forward(self, sample: Tensor, colours: Tensor) -> Tensor:
        return 0.75 * self.copies(colours) + 0.25 * self.scatters(colours) + 0 * self.dead(colours)


def recipe(reference: Any = GRID) -> Recipe:
    site = Site("copies|scatters|dead", generated=Tokens(GRID), reference=Tokens(reference))
    return Recipe("", (site,), timestep=None, rows="all")


def remake(reference: Tensor, net: Net | None = None, **changes: Any) -> Remake:
    """Images of 16x12 whose patches are the colours that the net fetched; the truth is that nothing is moved."""
    net = net or Net()

    def make(pictures: Tensor) -> Tensor:
        colours = F.adaptive_avg_pool2d(pictures, GRID).flatten(2).mT
        with announce(step_index=0, conditional_rows=slice(0, len(pictures))):
            fetched = net(torch.zeros(len(pictures), 1, *GRID), colours)
        return F.interpolate(fetched.mT.reshape(-1, 3, *GRID), (16, 12), mode="nearest")

    count = len(reference)
    everywhere = torch.ones(count, 16, 12, dtype=torch.bool)
    y, x = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(12) + 0.5) / 12, indexing="ij")
    given = {
        "target": net, "recipe": recipe(), "names": [f"s{row}" for row in range(count)], "indices": range(count),
        "reference": reference, "make": make, "garment": everywhere, "mask": everywhere, "worn": everywhere,
        "correspondence": torch.stack([y, x], dim=-1).expand(count, -1, -1, -1),
    }  # fmt: skip
    return Remake(**{**given, **changes})


def results_of(rows: list[dict[str, Any]], layers: list[str]) -> dict[str, Any]:
    """As `i2am diagnose` writes them."""
    found = diagnosed(rows, layers, least_use=0.02)
    return {"label": "net", **found, "settings": {"least_use": 0.02}, "provenance": {}}


@pytest.fixture
def reference() -> Tensor:
    """Two garments whose patches have random colours."""
    colours = torch.rand(2, 3, *GRID, generator=torch.Generator().manual_seed(0))
    return F.interpolate(colours, (16, 12), mode="nearest")


def out_of_order(sees: Tensor) -> float:
    """Share of the pairs in rows and columns that a permutation of the patches puts out of order, by loops."""
    pairs = [(at, at + step, 1) for at in range(12) for step in (1, 2) if at % 3 + step < 3]
    pairs += [(at, at + 3 * step, 0) for at in range(12) for step in (1, 2, 3) if at + 3 * step < 12]
    where = [(int(patch) // 3, int(patch) % 3) for patch in sees]
    gaps = [where[later][axis] - where[first][axis] for first, later, axis in pairs]
    return sum(1.0 if gap < 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)


def test_the_layer_that_scatters_is_proposed(reference: Tensor) -> None:
    """Every figure has the value that the construction gives it, and the rule finds the one layer to repair."""
    counted: list[int] = []
    rows = diagnosis(remake(reference), DiagnosisConfig(), lambda: counted.append(1))
    heads = layer_heads(Net(), recipe(), DiagnosisConfig())
    assert heads == {"copies": 2, "scatters": 2, "dead": 2}
    assert len(counted) == images_of(heads, DiagnosisConfig()) == 14
    colours = F.adaptive_avg_pool2d(reference, GRID).flatten(2)
    away = colours - colours.mean(dim=2, keepdim=True)
    for row, sample in enumerate(rows):
        whole = float(away[row].abs().mean())
        assert sample["use/copies"] == sample["use/copies#0"] == pytest.approx(0.75 * whole, rel=1e-4)
        assert sample["use/scatters"] == sample["use/scatters#0"] == pytest.approx(0.25 * whole, rel=1e-4)
        for silent in ("dead", "dead#0", "copies#1", "scatters#1"):
            assert sample[f"use/{silent}"] == 0
        for place, sees in (("copies#0", OWN), ("copies#1", OWN.flip(0)), ("scatters#0", SCATTERED)):
            moved = torch.stack([sees // 3 - OWN // 3, sees % 3 - OWN % 3]).float().norm(dim=0)
            assert sample[f"violations/{place}"] == pytest.approx(out_of_order(sees), abs=1e-6)
            assert sample[f"error/{place}"] == pytest.approx(float(moved.mean()), abs=1e-4)
            assert sample[f"spread/{place}"] == pytest.approx(1, abs=1e-4)
            assert sample[f"round_trip/{place}"] == pytest.approx(1, abs=1e-4)
            assert sample[f"entropy/{place}"] == pytest.approx(0, abs=1e-4)
            assert sample[f"sinks/{place}"] == sample["sinks@0/copies"] == pytest.approx(1 / 12, abs=1e-4)
        assert sample["where/copies#0"] > 0.75 > 0.5 > sample["where/scatters#0"]
        # The layer's map is the mean of a head that copies and one that looks across: all centres in the middle.
        assert sample["spread/copies"] == pytest.approx(0, abs=1e-4)
        # Others count by their use: scatters hears copies alone, of whose two heads the first is compared here.
        assert sample["agreement/scatters"] == pytest.approx(0, abs=1e-3)
    found = diagnosed(rows, list(heads), least_use=0.02)
    assert found["findings"]["dead"] == {
        "used": False, "scattered": True, "reasons": found["findings"]["dead"]["reasons"], "proposed": False,
        "near": False,
    }  # fmt: skip


class Single(Look):
    """The same with its first head alone."""

    heads = 1

    def __init__(self, sees: Tensor) -> None:
        super().__init__(sees)
        self.queries = self.queries[:, :12]

    def forward(self, colours: Tensor) -> Tensor:
        rows = len(colours)
        q, k = self.to_q(self.queries.expand(rows, -1, -1)), self.to_k(torch.eye(12).expand(rows, -1, -1))
        return (q @ k.mT / 12**0.5).softmax(-1) @ colours


def single_heads() -> Net:
    net = Net()
    net.copies, net.scatters, net.dead = Single(OWN), Single(SCATTERED), Single(SCATTERED)
    return net


def test_the_proposal(reference: Tensor) -> None:
    """Of a layer in order, a scattered one that is used and a scattered one that is not, the second is proposed."""
    net = single_heads()
    rows = diagnosis(remake(reference, net), DiagnosisConfig())
    assert not any("#" in key for key in rows[0])  # a layer's only head is the layer
    found = diagnosed(rows, ["copies", "scatters", "dead"], least_use=0.02)
    assert found["proposal"]["layers"] == ["scatters"]
    assert "scatters: its choice changes the image by 0.0" in found["proposal"]["reason"]
    assert f"{out_of_order(SCATTERED):.0%}".replace("%", " %") in found["proposal"]["reason"]
    verdicts = {name: (one["used"], one["scattered"]) for name, one in found["findings"].items()}
    assert verdicts == {"copies": (True, False), "scatters": (True, True), "dead": (False, True)}
    # Layers come once, in the model's order, however they are asked.
    again = DiagnosisConfig(layers=["dead", "scatters", "copies", "dead"])
    assert diagnosis(remake(reference, net), again) == rows
    # Of the others, only copies is used; a field and its permutation agree by their covariance.
    places = torch.stack([OWN // 3, OWN % 3], dim=1).float()
    places = (places + 0.5) / places.new_tensor(GRID)
    moved = places[SCATTERED]
    covariance = ((places - places.mean(0)) * (moved - moved.mean(0))).sum() / (places - places.mean(0)).square().sum()
    assert rows[0]["agreement/scatters"] == pytest.approx(float(covariance), abs=1e-4)
    # Three layers whose disorder and error go together.
    assert found["foretold"]["violations"]["layers"]["n"] == 3
    assert found["foretold"]["violations"]["layers"]["rank_correlation"] == pytest.approx(1)
    objective = {"variant": "reward", "terms": {"dcml": {"weight": 0.1}, "cwg": {"weight": 0.2}}}
    options = repair({"label": "net", **found}, objective)
    assert options is not None  # sharp attention is not sharpened
    assert options["objective"] == {
        "variant": "reward", "terms": {"dcml": {"weight": 0.1}}, "layers": {"scatters": 1.0}
    }  # fmt: skip


def test_sinks_by_time(reference: Tensor) -> None:
    """A layer that looks at one patch in the first of two steps and at all in turn in the second."""
    net = single_heads()
    of_steps = [F.one_hot(torch.full((12,), 5), 12) * 200.0, F.one_hot(OWN, 12) * 200.0]

    def make(pictures: Tensor) -> Tensor:
        colours = F.adaptive_avg_pool2d(pictures, GRID).flatten(2).mT
        for step, queries in enumerate(of_steps):
            net.copies.queries = queries
            with announce(step_index=step, conditional_rows=slice(0, len(pictures))):
                fetched = net(torch.zeros(len(pictures), 1, *GRID), colours)
        return F.interpolate(fetched.mT.reshape(-1, 3, *GRID), (16, 12), mode="nearest")

    (row, _) = diagnosis(remake(reference, net, make=make), DiagnosisConfig(layers=["copies"]))
    assert row["sinks@0/copies"] == pytest.approx(1, abs=1e-4)
    assert row["sinks@1/copies"] == pytest.approx(1 / 12, abs=1e-4)
    assert row["sinks/copies"] == pytest.approx((1 + 1 / 12) / 2, abs=1e-4)
    table = next(one for one in diagnosis_tables(results_of([row], ["copies"])) if one.name == "diagnosis_sinks")
    assert [cell.text for cell in table.rows[0].cells if cell] == ["1.000", "0.083"]


def test_the_try_on_model_gets_the_figures_of_other_commands(
    make_small_model: Callable[..., Any], read_batch: Callable[..., Any]
) -> None:
    """Error and entropy as an evaluation measures them, use and where as `i2am faithful`."""
    model, batch, sampling = make_small_model(), read_batch([0, 1]), SamplingConfig(steps=2)
    subject, layer = remake_of(model, batch, sampling), "up_blocks.2.attentions.1"
    rows = diagnosis(subject, DiagnosisConfig(layers=[5], heads=False))
    explained = explain_batch(model, batch, sampling, AttributionConfig(layer=5, time_groups=2))
    faithful = faithfulness(subject, FaithfulnessConfig(layers=[5], shares=[0.5], random_draws=1))
    for row, one, judged in zip(rows, explained, faithful, strict=True):
        assert row[f"error/{layer}"] == pytest.approx(one.scores["correspondence_error"], rel=1e-5)
        assert row[f"entropy/{layer}"] == pytest.approx(one.scores["attention_entropy"], rel=1e-5)
        assert row[f"use/{layer}"] == judged[f"use/{layer}"] > 0
        assert row[f"where/{layer}"] == pytest.approx(judged[f"where/{layer}"], abs=1e-5)


def test_tables(reference: Tensor) -> None:
    """A row for each layer with its verdict, one for each head, and what foretells the error."""
    options = DiagnosisConfig()
    net = Net()
    net.copies = Single(OWN)
    names = ["copies", "scatters", "dead"]
    results = results_of(diagnosis(remake(reference, net), options), names)
    tables = {table.name: table for table in diagnosis_tables(results)}
    assert list(tables) == ["diagnosis_layers", "diagnosis_sinks", HEADS, "diagnosis_foretold"]
    layers, heads = tables["diagnosis_layers"], tables[HEADS]
    verdicts = {row.label: row.cells[-1].text for row in layers.rows if row.cells[-1]}
    assert verdicts == {"copies": "in order", "scatters": "repair", "dead": "not used, scattered"}
    assert [heading.label for heading in layers.headings][-2:] == ["True error", "Verdict"]
    assert [(row.group, row.label) for row in heads.rows] == [
        ("scatters", "head 0"), ("scatters", "head 1"), ("dead", "head 0"), ("dead", "head 1")
    ]  # fmt: skip
    assert [heading.label for heading in tables["diagnosis_foretold"].headings] == ["over 3 layers", "over 4 heads"]
    page = diagnosis_page(results, "layers: {scatters: 1.0}")
    assert "<p>Repair layer scatters.</p>" in page
    assert "layers: {scatters: 1.0}" in page


@pytest.mark.parametrize(
    ("violations", "near", "verdict"),
    [
        ([0.3, 0.31, 0.32, 0.3], False, "repair"),
        ([0.2, 0.35, 0.2, 0.35], True, "repair, near a limit"),
        ([0.2, 0.29, 0.2, 0.29], True, "in order, near a limit"),
        ([0.1, 0.12, 0.1, 0.12], False, "in order"),
    ],
)
def test_verdicts_near_a_limit_are_marked(violations: list[float], near: bool, verdict: str) -> None:
    """Where the interval over the samples holds the limit; a layer that is not used is far from it."""
    rows = [
        {"index": at, "name": "a", "use/l": 0.1, "violations/l": value, "use/m": 0.001, "violations/m": value}
        for at, value in enumerate(violations)
    ]
    results = results_of(rows, ["l", "m"])
    assert results["findings"]["l"]["near"] is near
    assert not results["findings"]["m"]["near"]
    table = layer_table(results)
    assert next(row.cells[-1].text for row in table.rows if row.cells[-1]) == verdict
    said = " ".join(verdict_sentences(results))
    assert ("Near a limit of the rule: l. It would decide otherwise" in said) is near


def test_nothing_to_repair(reference: Tensor) -> None:
    """Layers that are not used, layers in order, and samples without a mask, each by its reason."""
    net = single_heads()
    options = DiagnosisConfig(layers=["dead"])
    found = diagnosed(diagnosis(remake(reference, net), options), ["dead"], least_use=0.02)
    assert found["proposal"]["layers"] == []
    assert "the image depends on no layer's choice" in found["proposal"]["reason"]
    assert "not trained" in found["proposal"]["reason"]
    assert "agreement/dead" not in found["scores"]  # there is no other layer
    rows = diagnosis(remake(reference, net), DiagnosisConfig(layers=["copies"]))
    found = diagnosed(rows, ["copies"], least_use=0.02)
    assert "the layer that the image depends on (copies) is in order" in found["proposal"]["reason"]
    nowhere = torch.zeros(2, 16, 12, dtype=torch.bool)
    rows = diagnosis(remake(reference, net, mask=nowhere, worn=nowhere), DiagnosisConfig(layers=["copies"]))
    found = diagnosed(rows, ["copies"], least_use=0.02)
    assert "no sample has a mask" in found["proposal"]["reason"]
    assert repair({"label": "net", **found}, {"terms": {}}) is None


def test_without_truth(reference: Tensor) -> None:
    """The same figures but the error; where nothing is known to be worn, the painted region takes its place."""
    with_truth = diagnosis(remake(reference), DiagnosisConfig(heads=False))
    without = diagnosis(remake(reference, correspondence=None, worn=None), DiagnosisConfig(heads=False))
    for known, blind in zip(with_truth, without, strict=True):
        assert blind == {name: value for name, value in known.items() if not name.startswith("error")}
    assert diagnosed(without, ["copies", "scatters", "dead"], least_use=0.02)["foretold"] == {}


@pytest.mark.parametrize(
    ("grid", "found"), [(None, "tokens without a place in the picture"), (GridSize(1, 1), "a grid of 1x1")]
)
def test_references_without_patches_are_refused(grid: GridSize | None, found: str) -> None:
    """Before an image is made."""
    with pytest.raises(CaptureError, match=f"reference of layer .* has {found}.* at least 4 patches"):
        layer_heads(Net(), recipe(grid), DiagnosisConfig())


def test_layers_that_do_not_exist(reference: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"No attention layer is called 'else'.*copies .*scatters .*dead"):
        layer_heads(Net(), recipe(), DiagnosisConfig(layers=["else"]))


def test_attention_that_is_not_finite(reference: Tensor) -> None:
    net = single_heads()
    net.scatters.queries[3] = torch.nan
    with pytest.raises(CaptureError, match=r"not finite numbers, first seen in the attention of layer scatters"):
        diagnosis(remake(reference, net), DiagnosisConfig())
