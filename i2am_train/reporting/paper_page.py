"""The page of ``i2am report``: tables and figures in one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from i2am_train.reporting.pages import Section, page_environment
from i2am_train.reporting.provenance import provenance_rows


def paper_page(index: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The page as HTML.

    Args:
        index: what ``index.json`` of the report says: provenance, settings, inputs, what is left out.
        sections: tables and figures in their order.
    """
    made_from = {**index.get("inputs", {}), **index.get("detections", {})}
    return (
        page_environment()
        .get_template("paper.html.j2")
        .render(
            title=_title(index),
            facts=list(_facts(index)),
            sections=sections,
            making=list(provenance_rows(index)),
            left_out=left_out(index),
            settings=_as_text(index["settings"]),
            inputs={name: _as_text(made) for name, made in made_from.items()},
        )
    )


def left_out(index: Mapping[str, Any]) -> dict[str, str]:
    """Tables and figures that the inputs do not allow, and what they need."""
    return {**index.get("tables_left_out", {}), **index.get("left_out", {})}


def _title(index: Mapping[str, Any]) -> str:
    models = dict.fromkeys(entry["model"] for entry in index.get("evaluations", ()))
    named = list(models) or list(index.get("inputs") or index.get("detections", {}))
    return ", ".join(named[:4]) + (" and others" if len(named) > 4 else "")


def _facts(index: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Short facts for the head of the page: value and what it counts."""
    for name, counted in (
        ("evaluations", "evaluations"),
        ("tables", "tables"),
        ("inputs", "explained samples"),
        ("detections", "detection experiments"),
        ("figures", "figures"),
    ):
        if index.get(name):
            yield str(len(index[name])), counted


def _as_text(values: Any) -> str:
    return json.dumps(values, indent=2, default=str)
