"""Every command that computes, as it runs on a machine with a card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from i2am_train.config.store import compose
from i2am_train.data.parsing import DRESS_CODE
from i2am_train.detection.bench import make_shapes
from i2am_train.detection.experiment import run_experiment
from i2am_train.models.annotators import HumanParser, ViTPoseEstimator
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import chosen_device
from i2am_train.workflows.ablate import ablate
from i2am_train.workflows.data import cache
from i2am_train.workflows.evaluate import evaluate
from i2am_train.workflows.explain import explain
from i2am_train.workflows.explain import run as run_explain
from i2am_train.workflows.faithful import diagnose as run_diagnose
from i2am_train.workflows.faithful import run as run_faithful
from i2am_train.workflows.models import export, init
from i2am_train.workflows.train import rehearse, train
from tests.support.card import card, on_card
from tests.support.detectors import tiny_maskformer, tiny_rt_detr, tiny_yolos
from tests.support.person_models import ATR, tiny_parser, tiny_pose_estimator
from tests.support.pipelines import tiny_catvton, tiny_ip_adapter
from tests.support.trainings import curves

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and diffusers' own deprecations
]


def judged(folder: Path) -> dict[str, float]:
    """Columns of the validation that have a value."""
    return {name: value for row in curves(folder) for name, value in row.items() if name.startswith("val/")}


SCORES = {
    "imacs_g", "imacs_r", "correspondence_error", "pck_1", "center_spread", "spread_ratio", "attention_entropy",
}  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["optimization.ema_decay=0.9", "trainer.keep_best=imacs_g"], id="averaged"),
        pytest.param(
            ["optimization.precision=bf16-mixed", "optimization.accumulate=2"], id="bf16", marks=pytest.mark.slow
        ),
        pytest.param(
            ["optimization.precision=16-mixed", "optimization.gradient_checkpointing=true"],
            id="fp16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["optimization.trainable=lora", "optimization.lora_rank=2", "objective.terms.supervised=0.1"],
            id="lora",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.usefixtures("there")
def test_training_with_validation(training: list[str], extra: list[str], tmp_path: Path) -> None:
    options = [*training, "experiment=refined", *extra, f"output={tmp_path / 'run'}"]
    folder = train(compose("train", options))
    assert json.loads((folder / "manifest.json").read_text())["finished"]
    scores = judged(folder)
    assert {f"val/{name}" for name in (*SCORES, "ssim", "kd_efficientnet_lite0")} <= scores.keys()
    assert np.isfinite(list(scores.values())).all()
    assert (folder / "validation" / "epoch-0000" / "panel.png").is_file()


@pytest.mark.usefixtures("there")
def test_training_from_a_cache(
    training: list[str], small_dataset: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """The frozen networks wait on the CPU and come back for the validation; a rehearsal before."""
    given = [f"root={small_dataset}", f"init={small_checkpoint}", f"output={tmp_path / 'cache'}"]
    cache(compose("data_cache", [*given, "workers=0", "progress_bar=false", "device=cuda"]))
    options = [
        *training, "experiment=refined", f"data.cache={tmp_path / 'cache'}", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    rehearse(compose("train", options))
    folder = train(compose("train", options))
    assert np.isfinite(judged(folder)["val/imacs_g"])


@pytest.mark.slow
@pytest.mark.usefixtures("there")
def test_a_study(training: list[str], tmp_path: Path) -> None:
    options = [
        *training, "arms=[base,refined]", "reference=base", "seeds=[0]", "validation.samples=0",
        "evaluation.samples=3", "evaluation.panel_samples=1", "bootstrap_samples=100", "device=cuda",
        "evaluation.metrics=[ssim]", f"output={tmp_path / 'study'}",
    ]  # fmt: skip
    results = ablate(compose("ablate", options))
    for cell in results["cells"]:
        assert np.isfinite([cell["metrics"][name] for name in (*SCORES, "ssim")]).all()


def test_an_evaluation(machine: Any, overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """On the card as on the CPU in the same precision up to the order of sums (a real card's convolutions are TF32)."""
    scores = {}
    for device in ("cpu", "cuda"):
        words = [
            *overrides, f"checkpoint={small_checkpoint}", f"device={device}", "progress_bar=false",
            "evaluation.metrics=[ssim,stlpips,kd_efficientnet_lite0]", "evaluation.samples=3",
            "evaluation.panel_samples=2", "evaluation.batch_size=2", "tracking.wandb=disabled",
            "sampling.precision=32-true",
        ]  # fmt: skip
        with machine() as seen:
            results = evaluate(compose("evaluate", words), tmp_path / device)
        assert (seen.operations > 100) is (device == "cuda")
        scores[device] = results["metrics"]
    assert {*SCORES, "ssim", "stlpips", "kd_efficientnet_lite0"} <= scores["cuda"].keys()
    tolerance = 1e-4 if machine is card else 0.05
    for name in SCORES - {"pck_1"} | {"ssim", "stlpips"}:
        assert scores["cuda"][name] == pytest.approx(scores["cpu"][name], abs=tolerance), name


@pytest.mark.usefixtures("there")
def test_an_explanation(overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    words = [*overrides, f"checkpoint={small_checkpoint}", "sample=1", "device=cuda"]
    folder = explain(compose("explain", [*words, f"output={tmp_path / 'out'}"]))
    assert (folder / "explorer.html").is_file()
    assert (folder / "centers.png").is_file()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A person with the mask of the clothes, and a garment, as options."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, mode, back, shape in (
        ("image", "RGB", "#c9d6df", "#884444"),
        ("mask", "L", 0, 255),
        ("reference", "RGB", "white", "#2a7f62"),
    ):
        picture = Image.new(mode, (60, 80), back)
        ImageDraw.Draw(picture).rectangle((16, 20, 46, 60), fill=shape)
        picture.save(folder / f"{name}.png")
    return [f"{name}={folder / name}.png" for name in ("image", "mask", "reference")]


def ip_adapter(folder: Path) -> list[str]:
    base, adapter = tiny_ip_adapter(folder, "ip_adapter_full_face")
    return [f"checkpoint={base}", f"adapter={adapter}"]


def catvton(folder: Path) -> list[str]:
    base, attention = tiny_catvton(folder)
    return [f"checkpoint={base}", f"adapter={attention}"]


@pytest.mark.parametrize(
    ("model", "make"),
    [
        pytest.param("ip_adapter_full_face", ip_adapter, id="ip_adapter"),
        pytest.param("catvton", catvton, id="catvton", marks=pytest.mark.slow),
        pytest.param(
            "factory", lambda _: ["factory=tests.support.stableviton_like:build"], id="factory", marks=pytest.mark.slow
        ),
    ],
)
def test_explaining_other_models(
    machine: Any, pictures: list[str], model: str, make: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    words = [
        *make(tmp_path), *pictures, f"model={model}", "sampling.steps=2", "attribution.time_groups=2",
        "size=[64,48]", "device=cuda", f"output={tmp_path / 'out'}",
    ]  # fmt: skip
    with machine() as seen:
        run_explain(compose("explain", words))
    assert seen.operations > 100
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert np.isfinite(scores["imacs_g"])


def test_faithful(machine: Any, small_checkpoint: Path, overrides: list[str], tmp_path: Path) -> None:
    """Images are made on the card, and compared where their masks are."""
    words = [
        *(word for word in overrides if word.startswith("data.")), f"checkpoint={small_checkpoint}", "samples=2",
        "layers=[5]", "shares=[0.5]", "random_draws=1", "sampling.steps=2", "device=cuda", "progress_bar=false",
        f"output={tmp_path / 'out'}",
    ]  # fmt: skip
    with machine() as seen:
        run_faithful(compose("faithful", words))
    assert seen.operations > 100
    scores = json.loads((tmp_path / "out" / "faithfulness.json").read_text())["scores"]
    assert all(np.isfinite(score["mean"]) for score in scores.values())


def test_diagnosis(machine: Any, small_checkpoint: Path, overrides: list[str], tmp_path: Path) -> None:
    """Single heads are made uniform on the card."""
    words = [
        *(word for word in overrides if word.startswith("data.")), f"checkpoint={small_checkpoint}", "samples=2",
        "layers=[5]", "sampling.steps=2", "device=cuda", "progress_bar=false", f"output={tmp_path / 'out'}",
    ]  # fmt: skip
    with machine() as seen:
        run_diagnose(compose("diagnose", words))
    assert seen.operations > 100
    scores = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["scores"]
    assert all(np.isfinite(score["mean"]) for score in scores.values())


def test_detection(machine: Any, paint_by_example: Path, tmp_path: Path) -> None:
    """The pipeline, and detectors of each kind."""
    coco = make_shapes(tmp_path / "shapes", 2)
    detectors = [
        tiny_yolos(tmp_path / "yolos", box=(0.5, 0.5, 0.4, 0.5), score=0.8),
        tiny_rt_detr(tmp_path / "rt_detr"),
        tiny_maskformer(tmp_path / "maskformer"),
    ]
    words = [
        f"root={coco}", f"pipeline={paint_by_example}", "height=32", "width=48", "steps=2", "batch_size=2",
        "pictures=1", "device=cuda", "progress_bar=false", "tracking=files",
        f"detectors=[{','.join(map(str, detectors))}]",
    ]  # fmt: skip
    with machine() as seen:
        results = run_experiment(compose("detect", words), tmp_path / "run", chosen_device("cuda"))
    assert seen.operations > 100
    assert results["miou"]["generated"].keys() >= {*map(str, detectors), "i2am"}


def test_models_that_derive(machine: Any, tmp_path: Path) -> None:
    """The human parser and the pose estimator of ``i2am data derive`` go where the card is by themselves."""
    tiny_parser(tmp_path / "parser", ATR)
    tiny_pose_estimator(tmp_path / "estimator")
    photograph = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    with machine():
        parser = HumanParser.from_pretrained(str(tmp_path / "parser"), "auto")
        estimator = ViTPoseEstimator.from_pretrained(str(tmp_path / "estimator"), "auto")
        for one in (parser, estimator):
            assert on_card(next(iter(one.model.parameters())))
        assert parser([photograph], DRESS_CODE)[0].shape == (64, 48)
        assert len(estimator([photograph], [(0, 0, 48, 64)])) == 1


def test_export_and_the_exported_pipeline(
    machine: Any, small_checkpoint: Path, pictures: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    garment = Image.open(pictures[2].partition("=")[2])
    with machine() as seen:
        export(compose("export", [f"checkpoint={small_checkpoint}", f"output={folder}"]))
        pipeline: Any = DiffusionPipeline.from_pretrained(
            str(folder), custom_pipeline=str(folder), trust_remote_code=True
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cuda")
        made = pipeline(garment, garment, garment, num_inference_steps=2).images
    assert seen.operations > 100
    assert made[0].size == (48, 64)


def test_assembling_a_model(machine: Any, make_parts: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("unet", "vae", "dinov2"):
        make_parts(name).save_pretrained(tmp_path / "sd" / name)
    words = [f"unet={tmp_path / 'sd'}", f"encoder={tmp_path / 'sd' / 'dinov2'}", "height=128", "width=64"]
    with machine():
        init(compose("init", [*words, f"output={tmp_path / 'model'}"]))
    assert TryOnModel.from_pretrained(tmp_path / "model").device.type == "cpu"
