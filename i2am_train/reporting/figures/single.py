"""All figures of one explanation, as ``i2am explain`` draws them."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from i2am_train.attention.known import of_same_picture
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, array
from i2am_train.reporting.figures.alignment import alignment_plot, alignment_sheet
from i2am_train.reporting.figures.by_layer import layer_maps, time_and_head_maps
from i2am_train.reporting.figures.elements import map_panel, plain_panel
from i2am_train.reporting.figures.paper import plan
from i2am_train.reporting.figures.patches import reverse_across_layers, specific_reference
from i2am_train.reporting.figures.samples import sample_figure
from i2am_train.reporting.figures.sheet import Section, Sheet, draw_sheet


def figures_of(explanation: Explanation) -> dict[str, Figure]:
    """By name: of a try-on sample the paper's figures and the field of its attention centres; of other people's models
    those that the model allows. Each carries the marks of its maps."""
    drawn: dict[str, Figure] = {}
    if explanation.is_tryon:
        for figure in plan([explanation])[0]:
            drawn[figure.name] = draw_sheet(figure.sheet([explanation]))
        panels = {"model": [explanation.panels()]}
        return drawn | {"centers": sample_figure(panels, labels={"model": "generated"})}
    sheets = {
        "unified": unified_maps(explanation),
        "layers": layer_maps(explanation),
        "time_heads": time_and_head_maps(explanation),
    }
    if explanation.maps.store.joint:
        sheets["mass"] = mass_maps(explanation)
    scores_kept = explanation.record().scores_over_reference is not None
    if TO_REFERENCE in explanation.directions and scores_kept:
        sheets["specific_reference"] = specific_reference(explanation)
        sheets["reverse_specific"] = reverse_across_layers(explanation, [explanation.layer])
    if traced := _aligned_layers(explanation):
        sheets["alignment"] = alignment_sheet(explanation, traced)
        drawn["alignment_layers"] = alignment_plot(explanation.maps)
    marks = explanation.maps.marks
    return drawn | {name: draw_sheet(replace(sheet, warnings=marks)) for name, sheet in sheets.items()}


def _aligned_layers(explanation: Explanation) -> list[str]:
    """Layers with score matrices, where the reference shows what is generated."""
    if not of_same_picture(explanation.maps.store.recipe):
        return []
    layers = explanation.maps.store.layers
    return [one.layer for one in layers if one.scores_over_reference is not None]


def unified_maps(explanation: Explanation) -> Sheet:
    """Both pictures, and the unified map of each direction that there is with its score."""
    pictures = (
        plain_panel(explanation, TO_REFERENCE, "reference"),
        plain_panel(explanation, TO_GENERATED, "generated"),
    )
    maps = []
    for direction in explanation.directions:
        side = "g" if direction is TO_GENERATED else "r"
        unified = explanation.maps.unified(direction, explanation.weighting)
        score = explanation.scores.get(f"imacs_{side}")
        note = "" if score is None else f"IMACS {score:.3f}"
        heat = array(unified.normalised())
        maps.append(map_panel(explanation, direction, heat, f"$M_{side}$", note))
    return Sheet(
        sections=(Section(rows=((*pictures, *maps),), groups=(2, len(maps))),),
        caption=f"Unified attribution maps of {explanation.name} ({explanation.model}).",
    )


def mass_maps(explanation: Explanation) -> Sheet:
    """Share of its attention that each place gives to the reference: all layers, then by resolution."""
    store = explanation.maps.store
    grids = sorted({record.generated_grid for record in store.layers}, key=lambda grid: grid.tokens)
    by_title = {"all layers": explanation.maps} | {
        str(grid): explanation.maps.select([record.layer for record in store.layers if record.generated_grid == grid])
        for grid in grids
    }
    panels = []
    for title, maps in by_title.items():
        values = array(maps.mass())
        note = f"mean {values.mean():.2f}"
        panels.append(map_panel(explanation, TO_GENERATED, values, title, note))
    first = plain_panel(explanation, TO_GENERATED, "generated")
    return Sheet(
        sections=(Section(rows=((first, *panels),), groups=(1, len(panels))),),
        caption=f"Share of attention that goes to the reference, {explanation.name} "
        f"({explanation.model}); the rest goes to the generated picture itself.",
        scale="share of attention that goes to the reference",
    )
