"""What the tables say, and that each format says the same."""

import io
import re
from html import escape

import pytest
from matplotlib.text import Text
from rich.console import Console

from i2am_train.reporting.ablation_tables import (
    arm_table,
    as_latex,
    as_markdown,
    as_terminal,
    collapse_warnings,
    difference_tables,
    measured_metrics,
    notes,
    verdict_sentences,
)
from i2am_train.reporting.figures.canvas import plain_text
from i2am_train.reporting.table import html, latex_label, latex_text, markdown_text, number
from i2am_train.results.statistics import Verdict, verdict
from i2am_train.results.study import SCHEMA
from tests.support.terms import weights


def entry(mean, std=0.01):
    return {"mean": mean, "std": std, "n": 3}


def pair(metric, difference, low, high, positive, arm="refined"):
    return {
        "arm": arm,
        "against": "baseline",
        "metric": metric,
        "difference": difference,
        "low": low,
        "high": high,
        "n": 3,
        "positive": positive,
        "confidence": 0.95,
        "over": "seeds",
    }


@pytest.fixture
def results():
    """Three arms and one that is trained on the truth; metrics of both groups out of order."""

    def metric(label, better, digits, group):
        return {"label": label, "higher_is_better": better, "digits": digits, "group": group}

    values = {  # arm: imacs_g, ssim, error, spread
        "base": (-0.1, 0.6, 2.5, 1.0),
        "baseline": (0.1, 0.70004, 2.0, 1.1),
        "refined": (0.3, 0.69996, 1.0, 1.2),
        "supervised": (0.9, 0.9, 0.1, 1.3),
    }
    names = ("imacs_g", "ssim", "correspondence_error", "center_spread")
    return {
        "schema": SCHEMA,
        "command": "i2am ablate seeds=[0,1,2]",
        "minutes": 12.4,
        "machine": {"cpu": "Xeon", "cores": 2, "gpu": None},
        "metrics": {
            "imacs_g": metric("IMACS_g", True, 2, "attention"),
            "ssim": metric("SSIM", True, 3, "image"),
            "correspondence_error": metric("Error & <co>", False, 1, "attention"),
            "center_spread": metric("Spread", None, 2, "attention"),
            "fid": metric("FID", False, 2, "image"),
        },
        "arms": [
            {"name": name, "label": name, "losses": {"terms": weights(supervised=float(name == "supervised"))}}
            for name in values
        ],
        "seeds": [0, 1, 2],
        "cells": [
            {"arm": arm, "seed": seed, "metrics": {}, "samples": 64, "warnings": warned}
            for arm, seed, warned in (
                ("base", None, []),
                ("refined", 0, ["spread fell"]),
                ("refined", 1, []),
                ("refined", 2, ["spread fell"]),
            )
        ],
        "summary": {
            arm: {n: entry(v, None if arm == "base" else 0.01) for n, v in zip(names, of, strict=True)}
            for arm, of in values.items()
        },
        "paired": [
            pair("imacs_g", 0.2, 0.1, 0.3, 3),
            pair("ssim", -0.00008, -0.001, 0.001, 1),
            pair("correspondence_error", -1.0, -1.2, -0.8, 0),
            pair("center_spread", 0.1, 0.05, 0.15, 3),
            pair("imacs_g", 0.8, 0.7, 0.9, 3, arm="supervised"),
        ],
    }


def test_columns_stand_in_groups_and_unmeasured_metrics_are_left_out(results):
    assert list(measured_metrics(results)) == ["imacs_g", "correspondence_error", "center_spread", "ssim"]
    assert arm_table(results).groups == [("Attention", 3), ("Image", 1)]


def test_best_and_second_follow_direction_and_print(results):
    # SSIM 0.70004 and 0.69996 both print 0.700: equal rank. The arm that saw the truth has none.
    ranks = {row.label: [cell.rank for cell in row.cells] for row in arm_table(results).rows}
    assert ranks == {
        "base": [0, 0, 0, 2],
        "baseline": [2, 2, 0, 1],
        "refined": [1, 1, 0, 1],
        "supervised †": [0, 0, 0, 0],
    }


def test_a_column_of_equal_print_has_no_best(results):
    for arm in results["summary"].values():
        arm["ssim"]["mean"] = 0.5
    assert {row.cells[3].rank for row in arm_table(results).rows} == {0}


@pytest.mark.parametrize(
    ("better", "low", "high", "expected"),
    [
        (True, 0.1, 0.2, Verdict.BETTER),
        (True, -0.2, -0.1, Verdict.WORSE),
        (False, 0.1, 0.2, Verdict.WORSE),
        (False, -0.2, -0.1, Verdict.BETTER),
        (True, 0.0, 0.2, Verdict.NOT_SHOWN),
        (False, -0.2, 0.0, Verdict.NOT_SHOWN),
        (None, 0.1, 0.2, Verdict.HIGHER),
        (None, -0.2, -0.1, Verdict.LOWER),
        (None, -0.2, 0.1, Verdict.NOT_SHOWN),
        (True, None, None, Verdict.NOT_TESTED),
    ],
)
def test_verdict_follows_direction_and_interval_only(better, low, high, expected):
    assert verdict(better, low, high) is expected


def test_differences_carry_one_more_digit_and_counts_in_favour(results):
    refined, supervised = difference_tables(results).values()
    assert [heading.label for heading in refined.headings[:3]] == ["Difference", "95 % interval", "In favour"]
    found = {row.label: [cell and cell.text for cell in row.cells] for row in refined.rows}
    assert found["IMACS_g ↑"] == ["+0.200", "[0.100, 0.300]", "3/3", "3", "better"]
    assert found["Error & <co> ↓"][2] == "3/3"  # lower is better: none positive
    assert found["SSIM ↑"][2] == "1/3"
    assert found["Spread"][2] is None
    assert supervised.title == "supervised − baseline"


def test_sentence_names_what_is_better_and_what_is_not_shown(results):
    (sentence,) = verdict_sentences(results)  # none for the arm that saw the truth
    assert sentence == (
        "Refined against baseline over 3 seeds (95 % intervals, Student's t): "
        "better on IMACS_g (+0.200 [0.100, 0.300]) and Error & <co> (-1.00 [-1.20, -0.80]); "
        "Spread (+0.100 [0.050, 0.150]) higher; no difference shown: SSIM."
    )


def test_notes_tell_seeds_samples_intervals_machine_and_command(results):
    text = " ".join(notes(results))
    for part in (
        "over 3 training seeds (0, 1, 2)",
        "64 held-out samples",
        "Intervals: 95 % (Student's t) of paired differences over seeds",
        "trained with the true correspondence, which the others do not have: not ranked",
        "i2am ablate seeds=[0,1,2]",
        "12 minutes on Xeon, 2 cores",
    ):
        assert part in text
    at_once = {**results, "settings": {"jobs": 2}}
    assert "12 minutes of runs, 2 at a time, on Xeon" in " ".join(notes(at_once))
    known = " ".join(notes({**at_once, "wall_minutes": 6.6}))
    assert "12 minutes of runs, 2 at a time (7 minutes by the clock), on Xeon" in known


def test_warnings_are_said_once_with_their_seeds(results):
    assert collapse_warnings(results) == ("refined (seeds 0, 2): spread fell",)


def test_warnings_that_differ_in_numbers_only_are_said_once(results):
    for cell, ratio in zip(results["cells"][1:], ("0.25", "0.17"), strict=False):
        cell |= {"arm": "baseline", "warnings": [f"spread is {ratio} of the truth's"]}
    first, second = (cell["seed"] for cell in results["cells"][1:3])
    assert collapse_warnings(results)[0] == (
        f"baseline (seeds {first}, {second}), with the numbers of seed {first}: spread is 0.25 of the truth's"
    )


@pytest.mark.parametrize(
    ("value", "signed", "expected"),
    [(-0.004, True, "0.00"), (0.126, True, "+0.13"), (-1.0, False, "-1.00"), (0.0, True, "0.00")],
)
def test_number_never_prints_a_signed_zero(value, signed, expected):
    assert number(value, 2, signed=signed) == expected


def test_markdown_has_one_row_per_arm_and_bold_best(results):
    lines = as_markdown(results).splitlines()
    assert lines[0] == "| Arm | IMACS_g ↑ | Error & <co> ↓ | Spread | SSIM ↑ |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| base | -0.10 | 2.5 | 1.00 | 0.600 |"
    ssim = "**0.700** ± 0.010"
    assert lines[4] == f"| refined | **0.30** ± 0.01 | **1.0** ± 0.0 | 1.20 ± 0.01 | {ssim} |"
    assert "> **Warning.** refined (seeds 0, 2): spread fell" in lines
    assert all(line.count("|") == 6 for line in lines[:6])


def test_html_escapes_labels_and_marks_best_and_second(results):
    text = html(arm_table(results))
    assert "Error &amp; &lt;co&gt;" in text
    assert "<co>" not in text
    assert "IMACS<sub>g</sub>" in text
    assert "<strong>0.30</strong>" in text
    assert "<u>0.10</u>" in text
    assert "−0.10" in text
    assert text.count("<tr>") == 2 + 4


def test_html_differences_name_the_verdict_in_words_and_class(results):
    text = html(difference_tables(results)["refined"])
    assert '<span class="chip better">better</span>' in text
    assert '<span class="chip faint">no difference shown</span>' in text


def test_latex_is_escaped_and_balanced(results):
    text = as_latex(results)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"Error \& <co> $\downarrow$" in body
    assert r"$\mathbf{0.30}$" in body
    assert r"\underline{$0.10$}" in body
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 3
    assert body.count("{") == body.count("}")
    rows = [line for line in body.splitlines() if line.startswith(("base", "refined"))]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 4 for row in rows)


def test_latex_label_sets_only_an_index_low():
    assert latex_label("IMACS_g ↑") == r"IMACS$_g$ $\uparrow$"
    assert latex_label("fd_lite0") == r"fd\_lite0"


def test_terminal_shows_all_tables_in_a_narrow_window(results):
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(as_terminal(results))
    text = console.file.getvalue()
    for part in ("Attention", "Image", "refined − baseline", "no difference shown", "Warning: "):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


LABELS = [
    r"$\frac$",
    "$a$b$",
    "100 % & #1",
    "_new_ run_a",
    r"\input{x}",
    "*[/red]* `x` [b](c)",
    "<b>&amp;</b>",
    "[1] ~^{}",
    ":smile:",
    "größe 日本",
]


@pytest.mark.parametrize("label", LABELS)
def test_labels_mean_themselves_in_every_format(results, label):
    """What markup languages would read as their own is escaped, each in its one place."""
    next(arm for arm in results["arms"] if arm["name"] == "refined")["label"] = label
    console = Console(width=200, file=io.StringIO(), color_system=None, markup=False, emoji=False)
    console.print(as_terminal(results))
    assert label in console.file.getvalue()
    assert f'<th scope="row" class="arm">{escape(label)}' in html(arm_table(results))
    assert f"| {markdown_text(label)}" in as_markdown(results)
    assert re.sub(r"\\([!-/:-@[-`{-~])", r"\1", markdown_text(label)) == label  # CommonMark's escapes
    rows = [line for line in as_latex(results).splitlines() if latex_text(label) in line]
    assert len(re.findall(r"(?<!\\)&", rows[0])) == 4
    assert not rows[0].startswith(("[", "*"))  # they would belong to the row before
    assert not re.search(r"(?<!\\)[$%#_^~]", latex_text(label))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("*a*", r"\*a\*"),
        ("a_b _c_", r"a_b \_c\_"),
        ("[a](b)", r"[a]\(b)"),
        ("a < b & c &amp; $1$", r"a \< b & c \&amp; \$1\$"),
        ("[0.1, 0.2]", "[0.1, 0.2]"),
    ],
)
def test_markdown_escapes_only_what_is_markup(text, escaped):
    """Ordinary words and intervals stay readable in the file itself."""
    assert markdown_text(text) == escaped


@pytest.mark.parametrize("label", LABELS)
def test_figures_set_labels_as_they_are(label):
    """No formula is made of a label, and a legend shows all of them."""
    shown, is_formula = Text()._preprocess_math(plain_text(label))
    assert not plain_text(label).startswith("_")
    if label.startswith("_"):  # only this sign is one
        assert plain_text(label) == r"$\_$" + label[1:]
    else:
        assert (shown, bool(is_formula)) == (label, False)
