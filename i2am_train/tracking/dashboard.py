"""The dashboard of a project, in code: a workspace of live charts and a report to read, from one list of sections.

Panels refer to what the other modules of this package log, by the names in ``names``. A saved dashboard has those of
what the runs have logged by then.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import wandb
import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb.errors import CommError, UsageError
from wandb.sdk.lib.service.service_connection import WandbApiFailedError  # public nowhere

from i2am_train.config.evaluation import EvaluationConfig
from i2am_train.errors import TrackingError
from i2am_train.metrics.boxes import METHOD_LABELS, METHODS_OF_MAPS
from i2am_train.metrics.registry import METRICS
from i2am_train.tracking.names import (
    ARM,
    ATTRIBUTION,
    ATTRIBUTION_GENERATED,
    ATTRIBUTION_REFERENCE,
    DETECTION,
    DETECTION_BOXES,
    DETECTION_DELTA,
    DETECTION_METHODS,
    DETECTION_SWEEP,
    DETECTION_TABLE,
    DETECTION_THRESHOLDS,
    EVALUATION,
    LEARNING_RATE,
    LOSS,
    LOSSES,
    STEP,
    STUDY_ARMS,
    STUDY_DIFFERENCES,
    TABLE,
    VALIDATION,
)

_TITLE = "i2am_train"

T = TypeVar("T")


class _Panel(NamedTuple):
    """A panel, and the name under which is logged what it shows."""

    shows: str | None
    """None: of whatever there is."""
    panel: Any


@dataclass(frozen=True, kw_only=True)
class _DashboardSection:
    """Panels under one heading, and what the report says above them."""

    name: str
    text: str
    panels: Sequence[_Panel]
    by_arm: bool = False
    """Runs of one arm count together in the report."""


def sections(logged: Collection[str] | None = None) -> list[_DashboardSection]:
    """What workspace and report show, in order.

    Args:
        logged: names of what the runs have logged; other panels, and sections without any, are left out. None: not
            known; all panels, but single terms of attention losses, which share one.

    >>> [section.name for section in sections()][:3]
    ['Attention scores', 'Whether attention is a cause', 'Image quality']
    >>> [panel.shows for section in sections({"loss/tv", "lr"}) for panel in section.panels]
    ['loss/tv', 'lr', None]
    """
    if logged is None:
        return _all_sections(LOSSES[:2])
    terms = sorted(name for name in logged if name.startswith(LOSS) and "@" not in name and name not in LOSSES)
    found = []
    for section in _all_sections((*LOSSES, *terms)):
        kept = [one for one in section.panels if one.shows is None or one.shows in logged]
        if any(one.shows for one in kept):
            found.append(replace(section, panels=kept))
    return found


def _all_sections(losses: Sequence[str]) -> list[_DashboardSection]:
    chosen = [*_metrics("attention"), *_metrics("faithfulness"), *_metrics("image")]
    return [
        _DashboardSection(
            name="Attention scores",
            text="On the validation samples. A small spread ratio is collapse, which IMACS does not see.",
            panels=[_curve(VALIDATION + name, METRICS[name].label) for name in _metrics("attention")],
        ),
        _DashboardSection(
            name="Whether attention is a cause",
            text="Of the first samples (validation.faithful_samples). A layer without use is repaired to no effect.",
            panels=[_curve(VALIDATION + name, METRICS[name].label) for name in _metrics("faithfulness")],
        ),
        _DashboardSection(
            name="Image quality",
            text="Of the validation samples; distances between sets mean little for so few.",
            panels=[_curve(VALIDATION + name, METRICS[name].label) for name in _metrics("image")],
        ),
        _DashboardSection(
            name="Losses",
            text="Each term without its weight, and the learning rate.",
            panels=[
                *(_curve(name, name) for name in (*losses, LEARNING_RATE)),
                # Whatever terms there are, of several layers also those of each.
                _Panel(None, reports.LinePlot(title="All terms", x=STEP, metric_regex=f"^{LOSS}")),
            ],
        ),
        _DashboardSection(
            name="Attribution and samples",
            text=(
                "Masks can be switched on and off: the inpainted region or the garment, and where the attribution is "
                "above delta. The table begins with the worst samples."
            ),
            panels=[
                _media("Attribution on generated images", VALIDATION + ATTRIBUTION_GENERATED),
                _media("Attribution on garments", VALIDATION + ATTRIBUTION_REFERENCE),
                _media("Both directions and centres", VALIDATION + ATTRIBUTION),
                _table(VALIDATION + TABLE),
            ],
        ),
        _DashboardSection(
            name="Ablation",
            text="Held-out samples, mean over the seeds of each arm; bars span the standard deviation.",
            panels=[
                *(_bars(EVALUATION + name, METRICS[name].label) for name in chosen),
                _table(STUDY_ARMS),
                _table(STUDY_DIFFERENCES),
                _table(EVALUATION + TABLE),
                _Panel(None, reports.RunComparer(diff_only="split")),
            ],
            by_arm=True,
        ),
        _DashboardSection(
            name="Object detection",
            text=(
                "Mean IoU of the boxes that the attention gives, by method and over the threshold of the map (runs of "
                "`i2am detect`). Boxes can be switched on and off."
            ),
            panels=[
                *(
                    _bars(f"{DETECTION}generated/{name}", f"{METHOD_LABELS[name]}: mean IoU")
                    for name in ("i2am", "i2am_inverted", "overall", "random")
                ),
                *(
                    _curve(DETECTION_SWEEP + name, f"{METHOD_LABELS[name]}: mean IoU", DETECTION_DELTA)
                    for name in METHODS_OF_MAPS
                ),
                _media("Boxes on painted images", DETECTION_BOXES),
                _table(DETECTION_METHODS),
                _table(DETECTION_THRESHOLDS),
                _table(DETECTION_TABLE),
            ],
        ),
    ]


def _make_workspace(entity: str, project: str, group: str | None, shown: Sequence[_DashboardSection]) -> Any:
    """The workspace, not saved: sections over the runs of a project or of one group."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=_title(group),
        sections=[
            workspaces.Section(name=section.name, panels=[one.panel for one in section.panels], is_open=True)
            for section in shown
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(
            filters=_filters(group),
            pinned_columns=[f"summary:{EVALUATION}{name}" for name in _metrics("attention")[:2]],
        ),
    )


def _make_report(entity: str, project: str, group: str | None, shown: Sequence[_DashboardSection]) -> Any:
    """The report, not saved. With a nameless entity it is made without asking the server for the project's number."""
    blocks: list[Any] = []
    for section in shown:
        runs = reports.Runset(
            entity=entity,
            project=project,
            name=group or project,
            filters=_filters(group),
            groupby=[f"config.{ARM}"] if section.by_arm else [],
        )
        blocks += [
            reports.H2(section.name),
            reports.P(section.text),
            reports.PanelGrid(runsets=[runs], panels=[one.panel for one in section.panels]),
        ]
    return reports.Report(
        entity=entity,
        project=project,
        title=_title(group),
        description="Attention, images, losses and the comparison of arms.",
        blocks=blocks,
        width="fluid",
    )


def dashboard_json(project: str, group: str | None) -> dict[str, Any]:
    """Both as W&B's own specifications, made without network, so that it is not known what the runs have logged.

    >>> list(dashboard_json("demo", group=None))
    ['project', 'group', 'workspace', 'report']
    """
    # The only way to see them without saving; their public methods all talk to the server.
    parts = {
        "workspace": _make_workspace("", project, group, sections())._to_model(),
        "report": _make_report("", project, group, sections())._to_model(),
    }
    return {
        "project": project,
        "group": group,
        **{name: part.spec.model_dump(mode="json", by_alias=True, exclude_none=True) for name, part in parts.items()},
    }


def save_dashboard(entity: str | None, project: str, group: str | None) -> tuple[str, str]:
    """Make both in W&B, anew at each call, of what the runs have logged; their addresses.

    Raises:
        TrackingError: not logged in, or the server cannot be reached or refuses.
    """
    api = _asked(wandb.Api)  # checks the login
    owner = entity or _asked(lambda: api.default_entity)
    if not owner:
        raise TrackingError("Weights & Biases knows no default entity for this login. Give entity=USER_OR_TEAM.")
    shown = sections(_asked(lambda: _logged(api, f"{owner}/{project}", group)))
    report = _asked(lambda: _make_report(owner, project, group, shown).save())
    workspace = _asked(lambda: _make_workspace(owner, project, group, shown).save())
    return str(workspace.url), str(report.url)


def _logged(api: Any, project: str, group: str | None) -> set[str] | None:
    """Names of all that the runs of a project or a group have logged; None where there are none yet."""
    runs = api.runs(project, filters={} if group is None else {"group": group}, lazy=False)
    return {name for run in runs for name in run.summary_metrics} or None


def _asked(ask: Callable[[], T]) -> T:
    """The answer of the server, or an error that says what to do."""
    try:
        return ask()
    except (CommError, UsageError, WandbApiFailedError) as error:
        raise TrackingError(
            f"Weights & Biases cannot be used now: {_one_line(error)} Run 'wandb login' and check the network (and "
            "WANDB_BASE_URL for a server of your own), or write the definition to a file with output=dashboard.json."
        ) from error
    except ValueError as error:  # where the server knows no such project
        raise TrackingError(
            f"Weights & Biases refuses the dashboard: {_one_line(error)} A project appears with the first run that is "
            "sent to it: give project=NAME, or send a run with 'wandb sync'."
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."


def _metrics(group: str) -> list[str]:
    """Names of a group's metrics; of image metrics those of the default options."""
    image = EvaluationConfig().metrics
    return [name for name, info in METRICS.items() if info.group == group and (group != "image" or name in image)]


def _curve(name: str, title: str, axis: str = STEP) -> _Panel:
    return _Panel(name, reports.LinePlot(title=title, x=axis, y=[name], max_runs_to_show=20))


def _bars(name: str, title: str) -> _Panel:
    over_runs = {"groupby": f"config.{ARM}", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return _Panel(name, reports.BarPlot(title=title, metrics=[name], **over_runs))


def _media(title: str, name: str) -> _Panel:
    return _Panel(name, reports.MediaBrowser(title=title, media_keys=[name], num_columns=4))


def _table(name: str) -> _Panel:
    return _Panel(name, reports.WeavePanelSummaryTable(table_name=name))


def _filters(group: str | None) -> Any:
    return "" if group is None else workspaces.And(workspaces.Metric("Group") == group)


def _title(group: str | None) -> str:
    return _TITLE if group is None else f"{_TITLE}: {group}"
