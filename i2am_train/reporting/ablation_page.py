"""The report of a study: ``report.html`` in one file, ``results.md``, ``results.tex`` and pictures.

``build_report`` only reads what the study wrote, so a report can be made again, elsewhere, without
the model or the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from i2am_train.files import write_text
from i2am_train.metrics.registry import MetricInfo
from i2am_train.reporting.ablation_tables import (
    arm_table,
    as_latex,
    as_markdown,
    capitalised,
    collapse_warnings,
    difference_tables,
    measured_metrics,
    notes,
    verdict_sentences,
)
from i2am_train.reporting.figures.arms import (
    ColumnGroup,
    difference_plot,
    metric_curves,
    sample_figure,
    tradeoff_metrics,
    tradeoff_plot,
)
from i2am_train.reporting.figures.canvas import arm_colors, save_figure
from i2am_train.reporting.pages import Picture, Section, embedded_file, making, page
from i2am_train.reporting.table import Cell, Heading, Row, Table, html, markdown_text, minus, number
from i2am_train.results.run_files import History, SamplePanels
from i2am_train.results.study import ArmRun, Results, Study, arm_labels, read_study, reference_arm, uses_truth

_MAX_ARMS_IN_PANEL = 4
_MAX_CENTER_ROWS = 4
_EXTREMES = 4
"""How many of the best and of the worst samples are listed."""
_RANKED_BY = "imacs_g"
"""The score that samples are ordered by."""
_LED_BY = "correspondence_error"
"""The score whose usual change the first picture shows."""


def build_report(folder: Path) -> Path:
    """Write the report of a finished run into its folder.

    Writes ``report.html``, ``results.md``, ``results.tex`` and ``figures/``; each file is complete
    or not there. Parts whose data the run did not keep are left out, and the page says so.

    Returns:
        The path of ``report.html``.

    Raises:
        RunFolderError: no ``results.json``, or a file that cannot be read.
    """
    study = read_study(Path(folder))
    results = study.results
    text = page(
        _title(results),
        list(_sections(study)),
        kind="attention of virtual try-on",
        facts=list(_facts(results)),
        verdicts=[minus(sentence) for sentence in verdict_sentences(results)],
        warnings=collapse_warnings(results),
    )
    sentences = "\n\n".join(map(markdown_text, verdict_sentences(results)))
    words = f"# {markdown_text(_title(results))}\n\n{sentences}\n\n{as_markdown(results)}"
    write_text(study.folder / "results.md", words)
    write_text(study.folder / "results.tex", as_latex(results))
    write_text(study.folder / "report.html", text)
    return study.folder / "report.html"


def _title(results: Results) -> str:
    reference, focus = reference_arm(results), focus_arm(results)
    labels = arm_labels(results)
    if reference is None or focus is None:
        return f"Evaluation of {', '.join(labels.values())}"
    return f"{capitalised(labels[focus])} against {labels[reference]}"


def focus_arm(results: Results) -> str | None:
    """The arm that the report is about: "refined", else the first that was compared.

    >>> focus_arm({"arms": [{"name": "ours"}], "paired": [{"arm": "ours"}]})
    'ours'
    """
    truth = {arm["name"] for arm in results["arms"] if uses_truth(arm)}
    compared = list(dict.fromkeys(entry["arm"] for entry in results["paired"]))
    candidates = [arm for arm in compared if arm not in truth] or compared
    if "refined" in candidates:
        return "refined"
    return candidates[0] if candidates else None


def _sections(study: Study) -> Iterator[Section]:
    results, arms = study.results, arm_table(study.results)
    yield from _lead_sections(study)
    lead = "" if arms.headings else "No cell of this run holds a score."
    table = html(arms, "main") if arms.headings else ""
    yield Section("Results", table, list(notes(results)), lead=lead)
    yield from _difference_sections(study)
    yield from _tradeoff_sections(study)
    if figures := list(_panel_figures(study)):
        yield Section("Samples", pictures=figures)
    if (samples := sample_table(study)) is not None:
        yield Section(samples.title, html(samples, "samples"), list(samples.notes))
    if figures := list(_curve_figures(study)):
        yield Section("Training", pictures=figures)
    made = making(results, results.get("settings") or {})
    terms = [*made.terms, *_making(results)]
    yield replace(made, terms=terms, notes=list(study.missing))
    terms = [
        (info.heading, (info.description or "No description was kept.") + (f" Unit: {info.unit}." if info.unit else ""))
        for info in measured_metrics(results).values()
    ]
    yield Section("What the metrics mean", terms=terms)


def _lead_sections(study: Study) -> Iterator[Section]:
    """One picture of what changed, of a usual sample: the panel whose score changes most nearly as the median does."""
    reference, focus = reference_arm(study.results), focus_arm(study.results)
    by_arm = {arm: panels for arm, panels in _panels_by_arm(study).items() if arm in (reference, focus)}
    if reference is None or focus is None or len(by_arm) < 2:
        return
    before, after = _mean_scores(study, reference, focus)
    changes = _changes(before, after, _LED_BY)
    names = [one.name for one in by_arm[focus]]
    known = [name for name in names if name in changes]
    middle = float(np.median(list(changes.values()))) if changes else 0.0
    name = min(known, key=lambda name: abs(changes[name] - middle)) if known else names[0]
    shown = {arm: [panels[names.index(name)]] for arm, panels in by_arm.items()}
    labels = arm_labels(study.results)
    figure = sample_figure(shown, (ColumnGroup.IMAGES, ColumnGroup.CENTERS), labels, arm_colors(labels))
    caption = (
        f"Sample {name}: what each arm makes, and where its patches look on the garment (layer "
        f"{by_arm[focus][0].layer}). Grey mesh: where they truly come from, if the data knows it."
    )
    if known:
        info = MetricInfo.of(_LED_BY, study.results["metrics"].get(_LED_BY, {}))
        change = _change(before[name][_LED_BY], after[name][_LED_BY], info)
        caption += (
            f" {info.label} {change}: of the samples that are drawn below, the change that is nearest to the median of "
            f"all {len(changes)}."
        )
    picture = _block(study, figure, "lead.png", caption, f"Pictures and attention centres of sample {name} by arm.")
    yield Section("What changed", pictures=[picture])


def _difference_sections(study: Study) -> Iterator[Section]:
    """One for each compared arm, that which the report is about first; the figure of all stands in the first."""
    focus, title = focus_arm(study.results), "Paired differences"
    tables = sorted(difference_tables(study.results).items(), key=lambda item: item[0] != focus)
    lead = (
        "Each arm is compared with the reference arm pair by pair. “Better” and “worse” are said only where the "
        "interval excludes zero."
    )
    if not tables:
        yield Section(title, lead="No two trained arms share a seed, so there are no paired differences.")
    for index, (_, table) in enumerate(tables):
        section = Section(f"{title}: {table.caption}", html(table, "differences"))
        yield section if index else replace(section, pictures=[_difference_figure(study)], lead=lead)


def _tradeoff_sections(study: Study) -> Iterator[Section]:
    """Where the truth is known: whether better attention comes with better pictures."""
    if not (metrics := tradeoff_metrics(study.results)):
        return
    figure = tradeoff_plot(study.results)
    save_figure(figure, study.folder / "figures" / "tradeoff.png")
    names = ", ".join(info.label for info in metrics.values())
    picture = _block(
        study,
        figure,
        "tradeoff.svg",
        "Image quality over the error of the attention; better is to the right and up. Small points: runs; "
        "large ones: means of arms; hollow: trained with the true correspondence.",
        f"Scatter plots of {names} over correspondence error, a point for each run; the means are in the table above.",
    )
    yield Section("Attention against pictures", pictures=[picture])


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    """Short facts for the head of the page: value and what it counts."""
    seeds = {cell["seed"] for cell in results["cells"] if cell["seed"] is not None}
    samples = {cell["samples"] for cell in results["cells"] if cell.get("samples")}
    yield str(len(results["arms"])), "arms"
    yield str(len(seeds)), "training seed" if len(seeds) == 1 else "training seeds"
    if samples:
        yield str(max(samples)), "held-out samples"
    if results.get("minutes") is not None:
        yield f"{results['minutes']:.0f}", "minutes"


def _making(results: Results) -> Iterator[tuple[str, str]]:
    """What else is known of how the run was made, as pairs of term and text."""
    if results.get("minutes") is not None:
        wall = results.get("wall_minutes")
        by_clock = "" if wall is None else f", {wall:.1f} minutes by the clock"
        yield "Duration", f"{results['minutes']:.1f} minutes in all{by_clock}"
    if seeds := sorted({c["seed"] for c in results["cells"] if c["seed"] is not None}):
        yield "Training seeds", ", ".join(map(str, seeds))
    for arm in results["arms"]:
        if losses := arm.get("losses"):
            yield f"Losses of {arm_labels(results)[arm['name']]}", _losses(losses)


def _losses(losses: Mapping[str, Any]) -> str:
    """Attention losses, as options keep them, in one line.

    >>> _losses({"variant": "reward", "layers": {"2": 1.0}, "terms": {"cwg": {"weight": 0.1, "sigma": 2}}})
    'variant reward, layers 2, cwg 0.1 (sigma 2)'
    """
    layers = " and ".join(name if weight == 1 else f"{weight} x {name}" for name, weight in losses["layers"].items())
    facts = [f"variant {losses['variant']}", f"layers {layers}"]
    for name, term in losses["terms"].items():
        more = ", ".join(f"{key} {value}" for key, value in term.items() if key != "weight")
        facts.append(f"{name} {term['weight']}{f' ({more})' if more else ''}")
    return ", ".join(facts)


# ---- figures -----------------------------------------------------------------------------------


def _block(study: Study, figure: Figure, name: str, caption: str, alt: str) -> Picture:
    path = save_figure(figure, study.folder / "figures" / name)
    return Picture(embedded_file(path), caption, alt, round(figure.get_figwidth() * 100))


def _difference_figure(study: Study) -> Picture:
    reference = arm_labels(study.results)[str(reference_arm(study.results))]
    save_figure(difference_plot(study.results), study.folder / "figures" / "differences.png")
    return _block(
        study,
        difference_plot(study.results),
        "differences.svg",
        f"Paired differences to {reference}. Bar: the interval of the table; large dot: mean; small dots: single "
        "seeds. Green is better, orange is worse, grey: the interval touches zero.",
        f"Small plots, one per metric, of the difference to {reference} with its interval; "
        "the same numbers are in the table above.",
    )


def _curve_figures(study: Study) -> Iterator[Picture]:
    histories = [run.history for run in study.runs if run.history]
    labels = arm_labels(study.results)
    colors = arm_colors(labels)
    for prefix, name, what in (
        ("val/", "curves_validation", "Validation scores"),
        ("loss/", "curves_losses", "Unweighted loss terms and their weighted sum"),
    ):
        quantities = _quantities(histories, prefix, study.results)
        if not quantities:
            continue
        figure = metric_curves(histories, quantities, labels, colors)
        save_figure(figure, study.folder / "figures" / f"{name}.png")
        caption = f"{what} during training. Thin lines: single seeds; thick line: their mean."
        alt = f"Curves over optimiser steps of: {', '.join(quantities.values())}."
        yield _block(study, figure, f"{name}.svg", caption, alt)


def _quantities(histories: Sequence[History], prefix: str, results: Results) -> dict[str, str]:
    """Titles of the logged columns with this prefix: metrics in table order, then the others."""
    logged = {name for history in histories for name in history.curves if name.startswith(prefix)}
    logged = {name for name in logged if not re.search(r"_(step|epoch)$", name)} or logged
    metrics = {f"{prefix}{name}": MetricInfo.of(name, entry).heading for name, entry in results["metrics"].items()}
    known = {name: title for name, title in metrics.items() if name in logged}
    others = {name: name.removeprefix(prefix).replace("_", " ") for name in sorted(logged - known.keys())}
    return {**known, **others}


def _panel_figures(study: Study) -> Iterator[Picture]:
    by_arm = _panels_by_arm(study)
    if not by_arm:
        return
    labels = arm_labels(study.results)
    colors = arm_colors(labels)
    main = {a: by_arm[a] for a in (reference_arm(study.results), focus_arm(study.results)) if a in by_arm}
    poster = sample_figure(main or by_arm, labels=labels, colors=colors, width=15.0)
    save_figure(poster, study.folder / "figures" / "samples.png", dpi=200)
    first = next(iter(by_arm.values()))
    for name, groups, caption in _panel_plan(first[0]):
        rows = _MAX_CENTER_ROWS if ColumnGroup.CENTERS in groups else None
        figure = sample_figure(by_arm, groups, labels, colors, rows=rows)
        alt = f"{caption} Rows: samples {', '.join(one.name for one in first)}."
        yield _block(study, figure, f"samples_{name}.png", caption, alt)


def _panel_plan(panels: SamplePanels) -> Iterator[tuple[str, tuple[ColumnGroup, ...], str]]:
    """Name, columns and caption of each figure of samples."""
    yield (
        "images",
        (ColumnGroup.INPUTS, ColumnGroup.IMAGES),
        "Held-out samples: what the model is given, the true photograph, and what each arm makes.",
    )
    yield (
        "maps",
        (ColumnGroup.GENERATED_MAPS, ColumnGroup.REFERENCE_MAPS),
        "Unified attribution maps over all layers, heads and steps. Left: where the garment's "
        "information lands in the generated image. Right: which parts of the garment were used.",
    )
    grid, reference = panels.generated_grid, panels.reference_grid
    yield (
        "centers",
        (ColumnGroup.CENTERS,),
        f"Attention centres of layer {panels.layer} ({grid} generated patches, {reference} "
        "reference patches). Grey mesh: where each garment patch truly comes from. Coloured mesh: "
        "the centre of its attention, with a thin line to its truth. Equal meshes are perfect.",
    )


def _panels_by_arm(study: Study) -> dict[str, tuple[SamplePanels, ...]]:
    """Panels of the arms to show, those of the lowest seed, if they are of the same samples."""
    chosen: dict[str, tuple[SamplePanels, ...]] = {}
    for arm in _arms_to_show(study.results):
        panels = next((run.panels for run in study.of_arm(arm) if run.panels), ())
        first = next(iter(chosen.values()), panels)
        if panels and [one.name for one in panels] == [one.name for one in first]:
            chosen[arm] = panels
    return chosen


def _arms_to_show(results: Results) -> list[str]:
    names = list(arm_labels(results))
    wanted = [a for a in (reference_arm(results), focus_arm(results)) if a is not None]
    others = [name for name in names if name not in wanted]
    kept = {*wanted, *others[: _MAX_ARMS_IN_PANEL - len(wanted)]}
    return [name for name in names if name in kept]


# ---- single samples ----------------------------------------------------------------------------


def sample_table(study: Study) -> Table | None:
    """The samples whose score changed most between the reference arm and the focus arm, with their pictures.

    A sample's score is its mean over the seeds that both arms have. ``None`` if no scores of
    single samples were kept.
    """
    reference, focus = reference_arm(study.results), focus_arm(study.results)
    if reference is None or focus is None:
        return None
    before, after = _mean_scores(study, reference, focus)
    changes = _changes(before, after, _RANKED_BY)
    if len(changes) < 2:
        return None
    ranked = sorted(changes, key=lambda name: (-changes[name], name))
    ranking = MetricInfo.of(_RANKED_BY, study.results["metrics"].get(_RANKED_BY, {}))
    metrics = {
        name: info
        for name, info in measured_metrics(study.results).items()
        if name in _LISTED_SCORES and any(name in before[sample] for sample in ranked)
    }

    def row(name: str, group: str) -> Row:
        pairs = ((before[name].get(m), after[name].get(m), i) for m, i in metrics.items())
        change = number(changes[name], ranking.digits, signed=True)
        pictures = {arm: kept for arm in (reference, focus) if (kept := _thumbnail(study, arm, name))}
        shown = {f"{name}, {arm}": kept for arm, kept in pictures.items()}
        cells = (
            Cell(change, value=changes[name]),
            *(Cell(_change(*pair)) for pair in pairs),
            Cell("", pictures=shown) if shown else None,
        )
        return Row(" ".join(filter(None, (name, _garment_name(study, name)))), cells, group)

    labels, count = arm_labels(study.results), min(_EXTREMES, len(ranked) // 2)
    first, second = labels[reference], labels[focus]
    return Table(
        title="Samples that changed most",
        corner="Sample",
        headings=(
            Heading("Change"),
            *(Heading(info.label, info.arrow) for info in metrics.values()),
            Heading("Pictures"),
        ),
        rows=(
            *(row(name, "gained most") for name in ranked[:count]),
            *(row(name, "gained least or lost") for name in ranked[::-1][:count]),
        ),
        notes=(
            f"{ranking.label} is higher with {second} than with {first} on "
            f"{sum(change > 0 for change in changes.values())} of {len(ranked)} samples. The two ends of the list are "
            f"shown; scores read {first} → {second}, as do the pictures.",
        ),
    )


_LISTED_SCORES = ("imacs_g", "imacs_r", "correspondence_error", "ssim", "stlpips")

Scores = Mapping[str, Mapping[str, float]]


def _mean_scores(study: Study, reference: str, focus: str) -> tuple[Scores, Scores]:
    """Scores by sample of both arms, means over the seeds that both have."""
    first, second = ({run.seed: run for run in study.of_arm(arm)} for arm in (reference, focus))
    shared = first.keys() & second.keys()
    return (
        _by_sample(run for seed, run in first.items() if seed in shared),
        _by_sample(run for seed, run in second.items() if seed in shared),
    )


def _changes(before: Scores, after: Scores, metric: str) -> dict[str, float]:
    """Of the samples that have the score on both sides."""
    return {
        name: after[name][metric] - before[name][metric]
        for name in before.keys() & after.keys()
        if metric in before[name] and metric in after[name]
    }


def _by_sample(runs: Iterable[ArmRun]) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for sample in run.samples:
            of_sample = values.setdefault(str(sample["name"]), {})
            for metric, value in sample.items():
                if isinstance(value, (int, float)) and np.isfinite(value):
                    of_sample.setdefault(metric, []).append(float(value))
    return {
        name: {metric: float(np.mean(of_seeds)) for metric, of_seeds in metrics.items()}
        for name, metrics in values.items()
    }


def _change(before: float | None, after: float | None, info: MetricInfo) -> str:
    first, second = ("–" if v is None else number(v, info.digits) for v in (before, after))
    return minus(f"{first} → {second}")


def _garment_name(study: Study, name: str) -> str:
    samples = (s for run in study.runs for s in run.samples if s["name"] == name)
    return str(next(samples, {}).get("garment_name", ""))


def _thumbnail(study: Study, arm: str, name: str) -> str | None:
    paths = (run.folder / "evaluation" / "images" / f"{name}.png" for run in study.of_arm(arm))
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else embedded_file(path)
