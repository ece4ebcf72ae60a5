"""Which evaluations are found, whose they are, what may stand side by side, and what the tables say of them.

The paper's own rows stand beside a run's scores.
"""

import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from i2am_train.config.evaluation import EvaluateConfig, EvaluationConfig
from i2am_train.config.objective import ObjectiveConfig
from i2am_train.config.options import plain
from i2am_train.config.store import arm_config, compose
from i2am_train.config.training import TrainConfig
from i2am_train.environment import provenance
from i2am_train.errors import ConfigError, RunFolderError
from i2am_train.evaluation.evaluator import EvaluationResult, write_evaluation
from i2am_train.metrics.attention import imacs_column
from i2am_train.metrics.registry import METRICS
from i2am_train.reporting import table as formats
from i2am_train.reporting.model_tables import (
    TABLE_2,
    UNPAIRED,
    correlation_figure,
    correlation_table,
    published_row,
    published_values,
    score_tables,
    selections,
)
from i2am_train.reporting.report_files import plan_tables, report_page
from i2am_train.results.evaluations import read_evaluations
from i2am_train.runs import RunFolder
from i2am_train.training.preflight import accumulation
from i2am_train.types import Pairing, PublishedModel
from i2am_train.workflows.evaluate import expected_values, print_scores
from tests.support.terms import weights

SAMPLES = 6
SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT_NAMES = ("keep_checkpoints.py", "update_readme.py")
Make = Callable[..., Path]


def rows(ssim: float, inside: float, outside: float, points: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Scores of single samples; IMACS at each (delta, lambda) from what lies inside and outside."""
    spread = np.linspace(-0.02, 0.02, SAMPLES)
    return [
        {"index": i, "name": f"{i:05d}", "garment_name": "g", "ssim": ssim + spread[i]}
        | {
            imacs_column(side, delta, penalty): inside - delta / 10 - penalty * outside + spread[i]
            for side in ("imacs_g", "imacs_r")
            for delta, penalty in points
        }
        | dict.fromkeys(("imacs_g", "imacs_r"), inside - 0.04 - 3 * outside + spread[i])
        for i in range(SAMPLES)
    ]


@pytest.fixture
def make_evaluation() -> Make:
    """Writes a finished evaluation with the writers of the commands."""

    def make(
        folder: Path,
        checkpoint: str,
        *,
        ssim: float = 0.7,
        inside: float = 0.5,
        outside: float = 0.1,
        distance: float = 80.0,
        data: str = "d0",
        points: Sequence[tuple[float, float]] = ((0.4, 3.0),),
        finish: bool = True,
        protocol: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        config = EvaluateConfig(checkpoint=checkpoint)
        for name, value in changes.items():
            group, option = name.split("__")
            setattr(getattr(config, group), option, value)
        settings = plain(config)
        opened = RunFolder.open(folder, settings)
        opened.start(data=data)
        scores = rows(ssim, inside, outside, points)
        result = EvaluationResult.from_rows(scores, {"fd_efficientnet_lite0": distance}, protocol)
        if finish:
            write_evaluation(folder, result, settings)
            opened.finish()
        return folder

    return make


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Writes the settings of a training run, as `i2am train` does."""

    def make(folder: Path, label: str, seed: int, **terms: float) -> Path:
        objective = ObjectiveConfig(terms=weights(**terms))
        config = TrainConfig(name=label.lower(), label=label, seed=seed, objective=objective)
        config.optimization.steps = 100
        RunFolder.open(folder, plain(config))
        return folder

    return make


@pytest.fixture
def study(tmp_path: Path, make_run: Callable[..., Path], make_evaluation: Make) -> Path:
    """Two models x three seeds, each with a snapshot at step 50, and the start; refined is better at all."""
    root = tmp_path / "study"
    make_evaluation(root / "cells/base/evaluation", "/weights/tiny", ssim=0.5)
    points = [(0.2, 3.0), (0.4, 3.0), (0.4, 1.0), (0.4, 5.0)]
    for label, gain, dcml in (("Baseline", 0.0, 0.0), ("Refined", 0.1, 0.007)):
        for seed in range(3):
            run = make_run(root / f"cells/{label.lower()}-seed{seed}", label, seed, dcml=dcml)
            shift = 0.01 * seed
            scores = {"points": points, "outside": 0.1 - shift / 10}
            make_evaluation(
                run / "evaluation", str(run / "model"), ssim=0.7 + gain / 2 + shift, inside=0.5 + gain + shift,
                distance=80 - 10 * gain - 100 * shift, **scores,
            )  # fmt: skip
            make_evaluation(
                run / "evaluation-step-000050", str(run / "snapshots/step-000050"), ssim=0.6 + gain / 2 + shift,
                inside=0.3 + gain + shift, distance=95 - 10 * gain, **scores,
            )  # fmt: skip
    return root


def test_scores_by_a_matched_correspondence_say_so(make_evaluation: Make, tmp_path: Path) -> None:
    """The mark of the data is in every table, and evaluations with and without it are not compared."""
    make_evaluation(tmp_path / "a", "/weights/a", protocol={"correspondence": "matched"})
    make_evaluation(tmp_path / "b", "/weights/b")
    for name, marked in (("a", True), ("b", False)):
        tables, _ = score_tables(read_evaluations([tmp_path / name]))
        assert tables
        assert all(any("was matched" in note for note in table.notes) == marked for table in tables)
    with pytest.raises(ConfigError, match=r"correspondence.*give mixed=true"):
        plan_tables([tmp_path / "a", tmp_path / "b"], (), mixed=False)


def test_a_study_is_its_models_seeds_and_snapshots(study: Path) -> None:
    """Label and seed come from the run behind the checkpoint; the start has neither seed nor steps."""
    found = read_evaluations([study])
    assert len(found) == 13
    start = next(e for e in found if e.label == "tiny")
    assert (start.seed, start.step, start.snapshot) == (None, None, False)
    refined = [e for e in found if e.label == "Refined"]
    assert {(e.seed, e.step, e.snapshot) for e in refined} == {
        (seed, step, step == 50) for seed in range(3) for step in (50, 100)
    }
    assert len({e.model for e in refined}) == 1
    assert len({e.run for e in refined}) == 3


def test_a_single_evaluation_and_a_run_are_found_too(study: Path) -> None:
    """Given twice, an evaluation is read once."""
    run = study / "cells/refined-seed0"
    found = read_evaluations([run / "evaluation", run])
    assert [(e.label, e.step) for e in found] == [("Refined", 100), ("Refined", 50)]


def test_names_replace_labels_of_folders_with_one_model(study: Path) -> None:
    cells = [study / "cells/refined-seed0", study / "cells/baseline-seed0"]
    assert {e.label for e in read_evaluations(cells, ["ours", "theirs"])} == {"ours", "theirs"}
    with pytest.raises(ConfigError, match=r"study holds several models \(tiny, Baseline, Refined\)"):
        read_evaluations([study], ["ours"])
    with pytest.raises(ConfigError, match="names has 1 entries for 2 folders"):
        read_evaluations(cells, ["ours"])


def test_models_of_one_label_and_other_training_are_told_apart(
    tmp_path: Path, make_run: Callable[..., Path], make_evaluation: Make
) -> None:
    """By the part of the path in which they differ; they never share a row."""
    for name, dcml in (("short", 0.01), ("long", 0.02)):
        run = make_run(tmp_path / name / "cells/refined-seed0", "Refined", 0, dcml=dcml)
        make_evaluation(run / "evaluation", str(run / "model"))
    found = read_evaluations([tmp_path / "short", tmp_path / "long"])
    assert [e.label for e in found] == ["Refined (short)", "Refined (long)"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "d1"}, r'data: "d0" \(a\) against "d1" \(b\)'),
        ({"sampling__steps": 50}, r"sampling.steps: 10 \(a\) against 50 \(b\)"),
        ({"attribution__penalty": 5.0}, r"attribution.penalty: 3.0 \(a\) against 5.0 \(b\)"),
    ],
)
def test_what_cannot_be_compared_is_refused_unless_asked_for(
    tmp_path: Path, make_evaluation: Make, changes: dict[str, Any], message: str
) -> None:
    """Different data, sampling or scores are refused by name; with mixed=true the table says what differs."""
    folders = [make_evaluation(tmp_path / "one", "/models/a")]
    folders.append(make_evaluation(tmp_path / "two", "/models/b", **changes))
    with pytest.raises(ConfigError, match=message + ".*give mixed=true"):
        read_evaluations(folders)
    planned = plan_tables(folders, (), mixed=True)
    _, sections = planned.write(tmp_path / "report", ["png"], 60)
    assert any(re.search("Not alike: " + message, note) for note in sections[0].notes)


def test_thresholds_that_only_add_scores_may_differ(tmp_path: Path, make_evaluation: Make) -> None:
    folders = [make_evaluation(tmp_path / "one", "/models/a")]
    folders.append(make_evaluation(tmp_path / "two", "/models/b", attribution__deltas=[0.2]))
    assert len(read_evaluations(folders)) == 2


def test_paired_and_unpaired_do_not_have_to_agree(tmp_path: Path, make_evaluation: Make) -> None:
    """They are columns of their own in Table 2, and one row."""
    paired = make_evaluation(tmp_path / "p", "/models/a", distance=70.0)
    unpaired = make_evaluation(
        tmp_path / "u", "/models/a", distance=90.0, sampling__seed=1, evaluation__pairing="unpaired"
    )
    (table, *_), _ = score_tables(read_evaluations([paired, unpaired]))
    assert [title for title, _ in table.groups] == ["Paired", "Unpaired"]
    (row,) = table.rows
    values = {(h.group, h.label): c.text for h, c in zip(table.headings, row.cells, strict=True) if c}
    assert values["Paired", "FD (EfficientNet-Lite0)"] == "70.00"
    assert values["Unpaired", "FD (EfficientNet-Lite0)"] == "90.00"


def test_folders_without_an_evaluation_are_refused(tmp_path: Path, make_evaluation: Make) -> None:
    with pytest.raises(RunFolderError, match="There is no folder"):
        read_evaluations([tmp_path / "nothing"])
    unfinished = make_evaluation(tmp_path / "unfinished", "/models/a", finish=False)
    with pytest.raises(RunFolderError, match=r"holds no finished evaluation.*i2am evaluate checkpoint="):
        read_evaluations([unfinished])
    other = make_evaluation(tmp_path / "other", "/models/a")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"schema": 7}))
    with pytest.raises(RunFolderError, match=r"of another version of i2am_train \(schema 7"):
        read_evaluations([other])


def test_table_2_has_means_intervals_and_ranks(study: Path) -> None:
    """Best bold, second underlined; intervals over seeds, or over samples where there is one checkpoint."""
    (table, *_), missing = score_tables(read_evaluations([study]))
    assert table.source == "Table 2"
    assert list(missing) == ["faithfulness"]
    column = [h.label for h in table.headings].index("SSIM")
    cells = {row.label: row.cells[column] for row in table.rows}
    assert {label: (c.text, c.rank, c.n) for label, c in cells.items() if c} == {
        "tiny": ("0.5000", 0, 1),
        "Baseline": ("0.7100", 2, 3),
        "Refined": ("0.7600", 1, 3),
    }
    half = 4.302653 * 0.01 / 3**0.5  # Student's t with two degrees of freedom
    assert cells["Refined"].interval == pytest.approx((0.76 - half, 0.76 + half), abs=1e-6)
    low, high = cells["tiny"].interval
    assert 0.48 < low < 0.5 < high < 0.52
    distance = [h.label for h in table.headings].index("FD (EfficientNet-Lite0)")
    start = next(row for row in table.rows if row.label == "tiny").cells[distance]
    assert start.interval is None
    assert start.rank == 0  # 80 against 79 and 78
    assert any("3 training seeds" in note for note in table.notes)


def test_faithfulness_names_the_layer_that_it_judges(tmp_path: Path, make_evaluation: Make) -> None:
    """By number and name, whichever the settings have; with mixed=true, each; nothing where it was not measured."""
    layers = (6, "up_blocks.2.attentions.2", 2, 3)
    folders = [make_evaluation(tmp_path / str(n), f"/models/{n}", attribution__layer=of) for n, of in enumerate(layers)]
    *measured, other = read_evaluations(folders, mixed=True)
    measured = [replace(one, metrics={**one.metrics, "use": 0.03, "where": 0.2}) for one in measured]
    notes = []
    for chosen in ([measured[0], other], measured[:2], measured):
        tables, _ = score_tables(chosen)
        (table,) = (table for table in tables if table.name == "faithfulness")
        notes.append(table.notes[0].partition("judge the attention of layer ")[2])
    assert notes == [
        "6 (up_blocks.2.attentions.2).",
        "6 (up_blocks.2.attentions.2).",
        "2 (up_blocks.1.attentions.1) or 6 (up_blocks.2.attentions.2).",
    ]


def test_tables_3_and_4_sweep_one_of_the_two(study: Path) -> None:
    """Each column is one delta at lambda 3, or one lambda at delta 0.4; Table 4 is affine in lambda."""
    _, deltas, penalties = score_tables(read_evaluations([study]))[0]
    assert [h.label for h in deltas.headings] == ["δ = 0.2", "δ = 0.4"] * 2
    assert [h.label for h in penalties.headings] == ["λ = 1", "λ = 3", "λ = 5"] * 2
    for row in penalties.rows:
        if row.label != "tiny":
            one, three, five = (cell.value for cell in row.cells[:3])
            assert five - three == pytest.approx(three - one, abs=1e-12)
    assert penalties.rows[0].cells[0] is None  # the start was evaluated at one penalty only


def test_correlation_is_scipys_over_all_checkpoints_and_knows_its_runs(study: Path) -> None:
    evaluations = read_evaluations([study])
    everything, equal, ends = selections(evaluations)
    assert [len(s.points) for s in (everything, equal, ends)] == [13, 12, 7]
    table = correlation_table(evaluations)
    row = next(r for r in table.rows if r.group == "All checkpoints" and r.label == "SSIM ↑")
    x = [e.metrics["imacs_g"] for e in everything.points]
    y = [e.metrics["ssim"] for e in everything.points]
    assert row.cells[0].value == pytest.approx(pearsonr(x, y).statistic)
    assert row.cells[1].value == pytest.approx(spearmanr(x, y).statistic)
    low, high = row.cells[0].interval
    assert low < row.cells[0].value < high
    assert "All checkpoints: 13 checkpoints of 7 training runs." in table.notes


def test_equal_steps_take_the_training_time_out(
    tmp_path: Path, make_run: Callable[..., Path], make_evaluation: Make
) -> None:
    """Both improve with time in every run and against each other between runs: plus over all, minus at equal steps."""
    for seed in range(4):
        run = make_run(tmp_path / f"run{seed}", "Model", seed)
        for step, name in ((50, "snapshots/step-000050"), (100, "model")):
            make_evaluation(
                run / f"evaluation-{step}", str(run / name),
                ssim=0.5 + step / 400 + 0.005 * seed, inside=0.3 + step / 400 - 0.005 * seed,
            )  # fmt: skip
    table = correlation_table(read_evaluations([tmp_path / f"run{seed}" for seed in range(4)]))
    values = {row.group: row.cells[0].value for row in table.rows if row.label == "SSIM ↑"}
    assert values["All checkpoints"] > 0.9
    assert values["At equal steps"] == pytest.approx(-1)
    assert values["Ends of training"] == pytest.approx(-1)


def test_kept_checkpoints_give_the_same_correlation(study: Path) -> None:
    """scripts/keep_checkpoints.py loses nothing that the table is made of, and its file needs no folder."""
    keep, update = (runpy.run_path(str(SCRIPTS / name)) for name in SCRIPT_NAMES)
    (study / "manifest.json").write_text(json.dumps({**provenance(), "started": "today"}))
    text = json.dumps(keep["of_folder"](study))
    assert str(study) not in text.partition('"checkpoints"')[2]
    table = correlation_table(read_evaluations([study]))
    assert table.rows == correlation_table(update["checkpoints"](text)).rows


def test_too_few_checkpoints_have_no_correlation(tmp_path: Path, make_evaluation: Make) -> None:
    folders = [make_evaluation(tmp_path / name, f"/models/{name}", ssim=0.6 + i / 10) for i, name in enumerate("abc")]
    planned = plan_tables(folders, (), mixed=False)
    assert planned.left_out["correlation"] == "paired evaluations of 4 checkpoints or more"
    assert correlation_figure(planned.evaluations) is None


def test_the_figure_has_a_point_for_each_checkpoint(study: Path) -> None:
    """Per side and metric; x and y are the table's numbers."""
    evaluations = read_evaluations([study])
    axes = correlation_figure(evaluations).axes
    assert len(axes) == 4  # IMACS_g and IMACS_r against FD and SSIM
    ssim = next(a for a in axes if a.get_ylabel() == "SSIM ↑")
    drawn = {tuple(point) for collection in ssim.collections for point in np.asarray(collection.get_offsets()).round(9)}
    assert drawn == {(round(e.metrics["imacs_g"], 9), round(e.metrics["ssim"], 9)) for e in evaluations}


def test_every_format_says_the_same(study: Path) -> None:
    (table, *_), _ = score_tables(read_evaluations([study]))
    assert "| Refined |" in formats.markdown(table)
    assert "**0.7600** [0.7352, 0.7848]" in formats.markdown(table)
    assert "<u>0.7100</u>" in formats.markdown(table)
    assert "<strong>0.7600</strong><small>[0.7352, 0.7848]</small>" in formats.html(table)
    latex = formats.latex(table)
    assert r"$\mathbf{0.7600}$" in latex
    assert r"\underline{$0.7100$}" in latex
    assert r"{\scriptsize $[0.7352, 0.7848]$}" in latex
    columns = len(table.headings) + 1
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {columns - 1}
    assert table.as_json()["rows"][2]["cells"][0]["rank"] == 1


def test_labels_are_text_in_every_format(tmp_path: Path, make_evaluation: Make) -> None:
    folder = make_evaluation(tmp_path / "one", "/models/a_b <i>&")
    planned = plan_tables([folder], (), mixed=False)
    (table, *_) = planned.tables
    assert "&lt;i&gt;&amp;" in formats.html(table)
    assert r"<i>\&" in formats.latex(table)
    index, sections = planned.write(tmp_path / "report", ["png"], 60)
    page = report_page({**provenance(), **index, "settings": {}}, sections)
    assert "<i>&" not in page
    assert "which needs evaluations at several thresholds" in page


def test_files_say_what_made_them(study: Path, tmp_path: Path) -> None:
    """Command, checkpoints, data and code in LaTeX, the index and the page."""
    index, sections = plan_tables([study], (), mixed=False).write(tmp_path / "report", ["svg"], 60)
    files = [file for entry in index["tables"] for file in entry["files"]]
    assert files == [
        *(
            f"tables/{name}.{kind}"
            for name in ("table2", "table3", "table4", "correlation")
            for kind in ("md", "tex", "json")
        ),
        "figures/correlation.svg",
    ]
    assert all((tmp_path / "report" / file).stat().st_size for file in files)
    latex = (tmp_path / "report/tables/table2.tex").read_text()
    assert f"checkpoints {study}/cells/refined-seed0/model, " in latex
    assert "data d0" in latex
    assert len(index["evaluations"]) == 13
    assert index["evaluations"][0]["checkpoint"] == "/weights/tiny"
    assert "refined-seed2/snapshots/step-000050" in sections[-1].html


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("results.json", {"metrics": 5}, r"results\.json has not the entries .*no attribute"),
        ("results.json", {"metrics": {"ssim": "high"}}, r"ssim='high' is no number"),
        ("results.json", {"intervals": 5}, "has not the entries"),
        ("results.json", {"intervals": {"ssim": 5}}, "has not the entries"),
        ("results.json", {"settings": 5}, "has not the entries"),
        ("results.json", {"settings": {"evaluation": {"pairing": "both"}}}, "'both' is not a valid"),
        ("results.json", {"protocol": 5}, "has not the entries"),
        ("results.json", {"samples": None}, "has not the entries"),
        ("results.json", [1], r"results\.json holds a value of type list where an object"),
        ("results.json", None, "holds a value of type NoneType where an object"),
        ("manifest.json", [1], r"manifest\.json holds a value of type list"),
        ("samples.jsonl", [1], r"samples\.jsonl has lines that are no JSON objects"),
    ],
)
def test_entries_of_other_types_name_the_file(
    tmp_path: Path, make_evaluation: Make, file: str, change: Any, message: str
) -> None:
    """A file that was changed by hand or by another program is refused when it is read, before a table is made."""
    folder = make_evaluation(tmp_path / "one", "/models/a")
    path = folder / file
    if isinstance(change, dict):
        change = json.loads(path.read_text()) | change
    path.write_text(json.dumps(change))
    with pytest.raises(RunFolderError, match=message):
        read_evaluations([folder])


def test_rows() -> None:
    """Every model that an option can name, with metrics that exist; IMACS_g orders them as FID does."""
    for model in get_args(PublishedModel):
        row = TABLE_2[model]
        assert set(row) <= set(METRICS)
        paired, unpaired = (published_values(model, paired=paired) for paired in (True, False))
        assert paired | unpaired == row
        assert set(unpaired) == set(UNPAIRED)
    by_fid = sorted(TABLE_2, key=lambda model: TABLE_2[model]["fid"])
    assert by_fid == sorted(TABLE_2, key=lambda model: -TABLE_2[model]["imacs_g"])
    assert "FID 11.6572" in published_row("custom")


def run_folder(path: Path, expected: str | None) -> str:
    path.mkdir()
    (path / "settings.json").write_text(json.dumps({"expected": expected}))
    return str(path)


def test_the_run_says_which_row(tmp_path: Path) -> None:
    """Settings of a run, or the option, which wins; nothing for models that the paper does not have."""
    run = run_folder(tmp_path / "run", "refined_custom")
    assert expected_values(EvaluateConfig(checkpoint=run))["ssim"] == 0.8644
    assert expected_values(EvaluateConfig(checkpoint=run, expected="custom"))["ssim"] == 0.8396
    unpaired = EvaluationConfig(pairing=Pairing.UNPAIRED)
    assert expected_values(EvaluateConfig(checkpoint=run, evaluation=unpaired)) == {"fid": 11.5420, "kid": 0.0022}
    for other in (run_folder(tmp_path / "other", None), "tiny"):
        assert expected_values(EvaluateConfig(checkpoint=other)) == {}


def test_the_row_is_printed_beside_the_scores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of its own, with a caution; none without a row."""
    monkeypatch.setenv("COLUMNS", "160")
    results: dict[str, Any] = {"samples": 8, "metrics": {"ssim": 0.8, "imacs_g": 0.1}, "intervals": {}, "warnings": []}
    print_scores(results, published_values("custom", paired=True))
    with_row = capsys.readouterr().out
    line = next(line for line in with_row.splitlines() if "SSIM" in line)
    assert "0.8396" in line
    assert "2,032 test pairs" in with_row
    print_scores(results)
    without = capsys.readouterr().out
    assert "paper" not in without
    assert "0.8396" not in without


@pytest.mark.parametrize("name", ["paper_custom", "paper_refined"])
def test_experiments_say_the_paper_s_hyperparameters(name: str) -> None:
    """Spec 1.4, through Hydra and as an arm of a study alike."""
    config = compose("train", [f"experiment={name}", "output=cell"])
    assert arm_config(compose("ablate"), name, seed=0, output=Path("cell").absolute()) == config
    optimization = config.optimization
    assert optimization.global_batch == 64
    assert accumulation(config, processes=2) * config.data.batch_size * 2 == 64
    assert (config.data.height, config.data.width, config.data.augment) == (512, 384, True)
    assert optimization.learning_rate == 1e-5
    assert (optimization.final_lr_fraction, optimization.warmup_steps) == (1.0, 0)
    assert (optimization.betas, optimization.weight_decay) == ((0.9, 0.999), 0.01)
    assert optimization.gradient_clip is optimization.ema_decay is optimization.snr_gamma is None
    assert (optimization.trainable, optimization.condition_dropout) == ("v1", 0.2)
    assert (config.sampling.sampler, config.sampling.steps, config.sampling.guidance) == ("ddim", 50, 5)
    assert (config.attribution.delta, config.attribution.penalty) == (0.4, 3)
    assert set(config.evaluation.metrics) == {"fid", "kid", "lpips", "ssim"}
    if name == "paper_custom":
        assert config.expected == "custom"
        assert optimization.steps == 90 * -(-11_647 // 64)
        assert not config.objective.active
    else:
        assert config.expected == "refined_custom"
        cwg = {"weight": 2.0, "sigma": 1.0, "detach_centers": False}
        assert config.objective.terms == weights(dcml=0.01, tv=1e-4) | {"cwg": cwg}
        assert config.objective.layer_weights == {2: 1.0}


def test_defaults_that_an_arm_cannot_have(tmp_path: Path) -> None:
    """An entry that is neither an experiment nor an override says what is possible."""
    file = tmp_path / "arm.yaml"
    file.write_text("defaults:\n  - /data: viton_hd\n")
    with pytest.raises(ConfigError, match=r"'override /GROUP: FILE'"):
        arm_config(compose("ablate"), str(file), seed=0, output=tmp_path)
