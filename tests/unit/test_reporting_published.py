"""reporting/model_tables.py and the experiments that repeat the paper: its row stands beside a run's scores."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from i2am_train.config.evaluation import EvaluateConfig, EvaluationConfig
from i2am_train.config.store import arm_config, compose
from i2am_train.errors import ConfigError
from i2am_train.metrics.registry import METRICS
from i2am_train.reporting.model_tables import TABLE_2, UNPAIRED, published_row, published_values
from i2am_train.training.preflight import accumulation
from i2am_train.types import Pairing, PublishedModel
from i2am_train.workflows.evaluate import expected_values, print_scores


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
        assert config.objective.weights == {"dcml": 0.01, "tv": 1e-4, "cwg": 2, "supervised": 0}
        assert (config.objective.sigma, config.objective.layer) == (1, 2)


def test_defaults_that_an_arm_cannot_have(tmp_path: Path) -> None:
    """An entry that is neither an experiment nor an override says what is possible."""
    file = tmp_path / "arm.yaml"
    file.write_text("defaults:\n  - /data: viton_hd\n")
    with pytest.raises(ConfigError, match=r"'override /GROUP: FILE'"):
        arm_config(compose("ablate"), str(file), seed=0, output=tmp_path)
