"""The report of a made-up run: what the page, the tables and the pictures say of it."""

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from i2am_train.errors import RunFolderError
from i2am_train.reporting.ablation_page import build_report, focus_arm, sample_table
from i2am_train.results.run_files import read_history
from i2am_train.results.study import SCHEMA, compare, read_study
from tests.support.terms import weights

ARMS = ("base", "baseline", "refined", "supervised")
GENERATED, REFERENCE = (8, 6), (16, 12)
METRICS = {
    "imacs_g": ("IMACS_g", True, 3, "attention", ""),
    "imacs_r": ("IMACS_r", True, 3, "attention", ""),
    "correspondence_error": ("Correspondence error", False, 2, "attention", "patches"),
    "pck_1": ("PCK@1", True, 3, "attention", ""),
    "center_spread": ("Centre spread", None, 2, "attention", "patches"),
    "ssim": ("SSIM", True, 4, "image", ""),
    "stlpips": ("ST-LPIPS", False, 4, "image", ""),
    "fd_efficientnet_lite0": ("FD (EfficientNet-Lite0)", False, 2, "image", ""),
}
PER_SAMPLE = tuple(name for name in METRICS if name != "fd_efficientnet_lite0")
TYPICAL = {  # per metric: mean per arm, scatter over seeds, scatter over samples
    "imacs_g": ((-0.12, -0.1, 0.09, -0.05), 0.02, 0.2),
    "imacs_r": ((-0.06, -0.05, 0.03, 0.01), 0.02, 0.2),
    "correspondence_error": ((2.4, 2.38, 0.8, 0.42), 0.05, 0.3),
    "pck_1": ((0.1, 0.12, 0.74, 0.95), 0.02, 0.1),
    "center_spread": ((1.6, 1.7, 2.6, 2.5), 0.05, 0.2),
    "ssim": ((0.68, 0.6825, 0.6825, 0.68), 0.001, 0.05),
    "stlpips": ((0.2, 0.1923, 0.1915, 0.195), 0.001, 0.03),
    "fd_efficientnet_lite0": ((3.9, 3.43, 3.5, 3.6), 0.05, 0.0),
}


def draw_garment(size, color):
    height, width = size
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.polygon(
        [(width * x, height * y) for x, y in ((0.3, 0.2), (0.7, 0.2), (0.95, 0.5), (0.8, 0.55))]
        + [(width * x, height * y) for x, y in ((0.72, 0.85), (0.28, 0.85), (0.2, 0.55), (0.05, 0.5))],
        fill=color,
    )
    draw.rectangle((width * 0.5, height * 0.4, width * 0.65, height * 0.5), fill="white")
    return np.asarray(image)


def draw_person(size, color, agnostic=False):
    height, width = size
    image = Image.new("RGB", (width, height), (205, 203, 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.4, 0, width * 0.6, height * 0.22), fill=(170, 120, 90))
    draw.rectangle((width * 0.3, height * 0.8, width * 0.7, height), fill=(60, 60, 80))
    color = (128, 128, 128) if agnostic else color
    draw.rounded_rectangle((width * 0.22, height * 0.22, width * 0.78, height * 0.82), 8, fill=color)
    return np.asarray(image)


def bump(size, center, width):
    y, x = np.mgrid[: size[0], : size[1]]
    squared = (y / size[0] - center[0]) ** 2 + (x / size[1] - center[1]) ** 2
    return np.exp(-squared / width**2)


def write_panels(path, arm, size, count=3):
    """Panels whose centres lie near the truth for refined arms and scattered for the others."""
    random = np.random.default_rng(ARMS.index(arm))
    colors = [(40, 90, 160), (160, 50, 70), (60, 140, 90), (200, 150, 40)][:count]
    y, x = np.mgrid[: GENERATED[0], : GENERATED[1]]
    inside = (y >= 2) & (y <= 6) & (x >= 1) & (x <= 4)
    target = np.stack([2.0 + 1.9 * (y - 1), 1.0 + 2.2 * (x - 0.2)], -1).astype(np.float32)
    target[~inside] = np.nan
    target = np.broadcast_to(target.reshape(-1, 2), (count, y.size, 2)).copy()
    scatter = {"refined": 0.45, "supervised": 0.2}.get(arm, 2.2)
    shrink = 1.0 if arm in {"refined", "supervised"} else 0.5
    middle = np.nanmean(target, axis=1, keepdims=True)
    centers = middle + shrink * (target - middle) + random.normal(0, scatter, target.shape)
    noise = random.integers(-12, 12, (count, *size, 3))
    person = np.stack([draw_person(size, color) for color in colors])
    map_generated = np.stack([bump(size, random.uniform(0.3, 0.7, 2), 0.2) for _ in colors])
    map_reference = np.stack([bump(size, random.uniform(0.3, 0.7, 2), 0.15) for _ in colors])
    pose = np.zeros((count, *size, 3), np.uint8)
    pose[:, size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4] = (50, 100, 240)
    arrays = {
        "garment": np.stack([draw_garment(size, color) for color in colors]),
        "agnostic": np.stack([draw_person(size, color, agnostic=True) for color in colors]),
        "densepose": pose,
        "person": person,
        "generated": np.clip(person + noise, 0, 255).astype(np.uint8),
        "map_generated": map_generated.astype(np.float32),
        "map_reference": map_reference.astype(np.float32),
        "centers": centers.astype(np.float32),
        "target_centers": target.astype(np.float32),
        "mask": np.broadcast_to(inside.reshape(-1), (count, y.size)).copy(),
    }
    names = [f"{index:05d}_00" for index in range(count)]
    metadata = {
        "layer": "up_blocks.1.attentions.1",
        "generated_grid": "8x6",
        "reference_grid": "16x12",
        "names": json.dumps(names),
        "garment_names": json.dumps([f"g{name}" for name in names]),
    }
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, metadata=metadata)
    return arrays["generated"]


def write_history(path, arm, seed):
    random = np.random.default_rng(seed)
    level = ARMS.index(arm)
    fields = ["epoch", "step", "val/imacs_g", "val/ssim", "loss/total", "loss/dcml"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for step in range(0, 160, 8):
            total = 0.3 + 0.5 / (1 + step / 20) + random.normal(0, 0.02)
            writer.writerow({"epoch": step // 40, "step": step, "loss/total": total})
            if step % 40 == 32:
                score = -0.1 + 0.1 * level * step / 160 + random.normal(0, 0.01)
                writer.writerow({"epoch": step // 40, "step": step, "val/imacs_g": score})


def write_cell(run, arm, seed, size, samples, pictures):
    name = arm if seed is None else f"{arm}-seed{seed}"
    folder = run / "cells" / name
    evaluation = folder / "evaluation"
    (evaluation / "images").mkdir(parents=True)
    random = np.random.default_rng([ARMS.index(arm), seed or 0])
    common = np.random.default_rng(99)  # a hard sample is hard for every arm
    rows = [{"name": f"{i:05d}_00", "garment_name": f"g{i:05d}_00"} for i in range(samples)]
    for metric in PER_SAMPLE:
        means, of_seed, of_sample = TYPICAL[metric]
        level = means[ARMS.index(arm)] + random.normal(0, of_seed)
        shared = common.normal(0, of_sample, samples)
        for row, value in zip(rows, shared + random.normal(0, of_sample / 4, samples), strict=True):
            row[metric] = float(level + value - shared.mean())
    metrics = {metric: float(np.mean([row[metric] for row in rows])) for metric in PER_SAMPLE}
    means, of_seed, _ = TYPICAL["fd_efficientnet_lite0"]
    metrics["fd_efficientnet_lite0"] = means[ARMS.index(arm)] + float(random.normal(0, of_seed))
    (evaluation / "results.json").write_text(json.dumps({"metrics": metrics, "samples": samples}))
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if pictures:
        shown = write_panels(evaluation / "panels.safetensors", arm, size)
        for index, picture in enumerate(shown):
            Image.fromarray(picture).save(evaluation / "images" / f"{index:05d}_00.png")
    if seed is not None:
        write_history(folder / "metrics.csv", arm, seed)
    return {"arm": arm, "seed": seed, "folder": f"cells/{name}", "metrics": metrics, "minutes": 3.5, "warnings": []}


def write_run(run, seeds=(0, 1, 2), size=(64, 48), samples=8, pictures=False):
    """A whole run folder with four arms; numbers like those of the prototype."""
    cells = [write_cell(run, "base", None, size, samples, pictures)]
    cells += [write_cell(run, arm, s, size, samples, pictures) for arm in ARMS[1:] for s in seeds]
    results = {
        "schema": SCHEMA,
        "kind": "ablation",
        "command": "i2am ablate 'seeds=[0,1,2]' name=<demo>",
        "git": {"commit": "0123abcd", "dirty": False},
        "machine": {"cpu": "Xeon Platinum 8481C", "cores": 2, "gpu": None},
        "started": "2026-11-23T19:05:00+00:00",
        "minutes": 74.2,
        "settings": {"seeds": list(seeds), "training": {"steps": 160}},
        "metrics": {
            name: {
                "label": label,
                "higher_is_better": better,
                "digits": digits,
                "group": group,
                "unit": unit,
                "description": f"What {label} means.",
            }
            for name, (label, better, digits, group, unit) in METRICS.items()
        },
        "arms": [
            {
                "name": arm,
                "label": arm,
                "losses": {
                    "variant": "reward",
                    "layers": {"2": 1.0, "5": 0.5},
                    "terms": {
                        **weights(supervised=float(arm == ARMS[3])),
                        "mine": {"fn": "my_package:loss", "weight": 0.5, "timesteps": [0, 500]},
                    },
                },
            }
            for arm in ARMS
        ],
        "seeds": list(seeds),
        "cells": cells,
    }
    results.update(compare(cells, METRICS, ARMS, "baseline"))
    save_results(run, results)
    return results


def save_results(run, results):
    (run / "results.json").write_text(json.dumps(results))


class Page(HTMLParser):
    """What a reader gets: text, pictures and addresses of a page; fails on unbalanced tags."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, path):
        super().__init__()
        self.open, self.pictures, self.links, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.pictures.append(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with three seeds, reported once for all tests that only look."""
    run = tmp_path_factory.mktemp("run")
    results = write_run(run, pictures=True)
    return run, results, Page(build_report(run))


def test_page_is_one_file_with_every_picture_described(finished):
    # Self-contained: nothing is fetched, and who cannot see a picture can read what it shows.
    _, _, page = finished
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert all(len(picture["alt"]) > 5 for picture in page.pictures)
    for link in page.links:
        assert len(base64.b64decode(link.split("base64,")[1], validate=True)) > 100


def test_page_says_what_the_numbers_say(finished):
    # The verdict is made from the intervals: far apart is "better", equal means are not.
    _, _, page = finished
    assert "Refined against baseline over 3 seeds (95 % intervals, Student's t): better on IMACSg (+0.1" in page.text
    verdict = re.search(r"Refined against baseline over 3 seeds(.*)", page.text)
    assert re.search(r"Centre spread \(\S+ \[\S+ \S+\]\) higher", verdict.group(1))  # no end is good
    assert "which the others do not have: not ranked" in page.text
    assert "Supervised against" not in page.text


def test_page_shows_markup_in_texts_of_the_run_as_text(finished):
    # A command or a name with angle brackets does not become part of the page.
    _, _, page = finished
    assert "i2am ablate 'seeds=[0,1,2]' name=<demo>" in page.text


def test_page_says_which_losses_an_arm_has(finished):
    # Those of the user's own, too.
    _, _, page = finished
    assert (
        "variant reward, layers 2 and 0.5 x 5, supervised 0.0, mine 0.5 (fn my_package:loss, timesteps [0, 500])"
        in page.text
    )


def test_a_report_of_labels_that_look_like_formulas(tmp_path):
    # After a whole study the report does not fail on what its arms are called.
    run = tmp_path / "run"
    results = write_run(run, pictures=True)
    for arm, label in zip(results["arms"], [r"$\\frac$", "$a$b$_c", "_x"], strict=False):
        arm["label"] = label
    save_results(run, results)
    text = Page(build_report(run)).text
    assert r"$\\frac$" in text
    assert "$a$b$_c" in text


def test_all_files_are_written_and_none_is_left_unfinished(finished):
    run, _, _ = finished
    written = {path.name for path in run.iterdir()} | {p.name for p in (run / "figures").iterdir()}
    assert {"report.html", "results.md", "results.tex", "samples.png", "differences.svg", "tradeoff.svg"} <= written
    assert not [name for name in written if name.startswith(".")]


def test_same_run_gives_the_same_report(finished):
    # No date, no random order: made again from the same files, the page is the same.
    run, _, _ = finished
    before = (run / "report.html").read_bytes()
    build_report(run)
    assert (run / "report.html").read_bytes() == before


def test_run_with_results_only_is_reported_with_what_is_missing(tmp_path):
    # Only results.json was kept: tables stay, each absent part is named.
    run = tmp_path / "run"
    run.mkdir()
    results = write_run(run, seeds=(0, 1))
    kept = tmp_path / "kept"
    kept.mkdir()
    save_results(kept, results)
    page = Page(build_report(kept))
    assert "No training history" in page.text
    assert "no samples" in page.text
    assert "No per-sample scores" in page.text
    assert "Samples that changed most" not in page.text
    assert "better on" in page.text


def test_single_seed_gets_intervals_over_samples_and_says_so(tmp_path):
    # The demo has one seed: the samples are resampled instead, and the page does not hide it.
    results = write_run(tmp_path, seeds=(0,))
    assert all(entry["low"] is None for entry in results["paired"])
    page = Page(build_report(tmp_path))
    sentence = "over 8 samples of one training seed (95 % intervals, bootstrap, BCa): better on IMACSg"
    assert sentence in page.text
    assert "With few samples they are too narrow" in page.text
    assert "they do not cover what another training seed would change" in page.text
    assert "not tested: FD (EfficientNet-Lite0)" in page.text


def test_intervals_that_an_earlier_version_wrote_are_made_anew(tmp_path):
    # Such a folder holds bootstrap intervals over seeds; the page says Student's t and means it.
    results = write_run(tmp_path, seeds=(0, 1, 2))
    narrow = [{**entry, "low": 1.0, "high": 2.0} for entry in results["paired"]]
    save_results(tmp_path, {**results, "paired": narrow})
    assert read_study(tmp_path).results["paired"] == results["paired"]


def test_warnings_stand_before_the_tables_once_with_their_seeds(tmp_path):
    results = write_run(tmp_path, seeds=(0, 1))
    for cell in results["cells"]:
        if cell["arm"] == "refined":
            cell["warnings"] = ["attention has collapsed: spread ratio 0.05"]
    save_results(tmp_path, results)
    page = Page(build_report(tmp_path))
    warning = "refined (seeds 0, 1): attention has collapsed: spread ratio 0.05"
    assert page.text.count(warning) == 1
    assert page.text.index(warning) < page.text.index("Paired differences")


def test_single_evaluation_without_any_comparison_is_reported(tmp_path):
    # One arm, no reference: a table without differences, no claim.
    results = write_run(tmp_path, seeds=(0,))
    for key in ("arms", "cells"):
        results[key] = [entry for entry in results[key] if entry.get("name", entry.get("arm")) == "base"]
    results.update(summary={}, paired=[])
    save_results(tmp_path, results)
    page = Page(build_report(tmp_path))
    assert "nothing is compared" in page.text
    assert "Evaluation of base" in page.text


def test_page_leads_with_a_usual_sample(finished):
    # Not with the best one: of the drawn samples, that whose change is nearest to the median of all.
    run, _, page = finished
    study = read_study(run)
    by_arm = {arm: {run.seed: run for run in study.of_arm(arm)} for arm in ("baseline", "refined")}
    scores = {
        arm: {
            name: np.mean(
                [next(s for s in r.samples if s["name"] == name)["correspondence_error"] for r in runs.values()]
            )
            for name in (sample["name"] for sample in runs[0].samples)
        }
        for arm, runs in by_arm.items()
    }
    changes = {name: scores["refined"][name] - scores["baseline"][name] for name in scores["refined"]}
    drawn = [panel.name for panel in by_arm["refined"][0].panels]
    usual = min(drawn, key=lambda name: abs(changes[name] - np.median(list(changes.values()))))
    assert 1 < len(drawn) < len(changes)
    before, after = (f"{scores[arm][usual]:.2f}" for arm in ("baseline", "refined"))
    assert page.text.index("What changed") < page.text.index("Results")
    assert f"Sample {usual}: " in page.text
    assert f"Correspondence error {before} → {after}: of the samples" in page.text
    assert page.pictures[0]["alt"].endswith(f"of sample {usual} by arm.")


def test_samples_are_ordered_by_their_change(finished):
    # First the largest gain, last the largest loss, from the mean over shared seeds.
    run, _, _ = finished
    listed = sample_table(read_study(run))
    gains, losses = (
        [float(row.cells[0].text) for row in listed.rows if row.group == group]
        for group in ("gained most", "gained least or lost")
    )
    assert gains == sorted(gains, reverse=True)
    assert losses == sorted(losses)
    assert max(losses) <= min(gains)
    assert "with refined than with baseline on" in listed.notes[0]
    assert " of 8 samples" in listed.notes[0]
    assert len(gains) == len(losses) == 4
    shown = {row.label.split()[0]: cell.pictures for row in listed.rows if (cell := row.cells[-1])}
    assert shown  # of the samples that have pictures
    for name, pictures in shown.items():
        assert list(pictures) == [f"{name}, baseline", f"{name}, refined"]


def test_focus_is_refined_and_never_the_arm_that_saw_the_truth(finished):
    _, results, _ = finished
    assert focus_arm(results) == "refined"
    without = [arm for arm in results["arms"] if arm["name"] != "refined"]
    paired = [entry for entry in results["paired"] if entry["arm"] != "refined"]
    assert focus_arm({**results, "arms": without, "paired": paired}) == "supervised"


def test_history_keeps_the_later_row_of_a_resumed_step(tmp_path):
    # A resumed run logs a step twice; empty and unreadable fields are no values.
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,loss/total,val/ssim\n0,3,1.5,\n0,4,2.5,x\n0,3,0.5,0.7\n,,9,9\n")
    history = read_history(path, "refined", 0)
    assert history.curves["loss/total"].steps.tolist() == [3, 4]
    assert history.curves["loss/total"].values.tolist() == [0.5, 2.5]
    assert history.curves["val/ssim"].values.tolist() == [0.7]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "has no results.json"),
        ("{", "not readable JSON"),
        ('{"schema": 1}', "has schema 1; this version reads schema 2"),
        ('{"schema": 2, "arms": []}', "lacks metrics, cells"),
    ],
)
def test_folder_that_is_no_run_is_refused_in_a_sentence(tmp_path: Path, text, match):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunFolderError, match=match):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_half_written_panels_are_refused_by_name(tmp_path):
    write_run(tmp_path, seeds=(0,), pictures=True)
    path = tmp_path / "cells" / "refined-seed0" / "evaluation" / "panels.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunFolderError, match=r"panels\.safetensors cannot be read"):
        build_report(tmp_path)
