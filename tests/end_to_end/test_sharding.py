"""Fully sharded training gives the model, the files and the curves of one process.

Real processes with gloo on CPUs. What a GPU would do differently (NCCL, streams, memory) is not seen here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from i2am_train.config.store import compose
from i2am_train.models.tryon import TryOnModel
from i2am_train.workflows.train import train
from tests.support.trainings import SCHEDULED, curves

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]

TOLERANCE = 1e-4
"""Relative: two halves of a batch are summed in another order than the whole, in float32, and 1e-7 grows over steps."""


def model_files(folder: Path) -> dict[str, Any]:
    """Weights by file and name, and the text of all other files."""
    files: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            files |= {f"{name}:{key}": value for key, value in load_file(path).items()}
        else:
            files[name] = path.read_text()
    return files


def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Euclidean, over all weights."""
    squares = [
        float((value - second[name]).square().sum()) for name, value in first.items() if isinstance(value, torch.Tensor)
    ]
    return sum(squares) ** 0.5


@pytest.fixture(scope="module")
def common(training: list[str]) -> list[str]:
    """Attention losses, averaged weights, clipped gradients, dropped conditions, and batches that two processes share.

    Five validation samples in batches of two: the processes generate unequally many.
    """
    return [
        *training, "validation.samples=5", "evaluation.batch_size=2", "tracking.tensorboard=false",
        "experiment=refined", *SCHEDULED, "optimization.gradient_clip=0.5", "optimization.condition_dropout=0.5",
        "optimization.global_batch=4", "optimization.warmup_steps=0",
        "trainer.checkpoint_every_n_steps=2", "trainer.keep_checkpoints=2",
        "trainer.snapshot_every_n_steps=3", "trainer.keep_best=ssim", "optimization.ema_decay=0.9",
    ]  # fmt: skip


def start(options: list[str], output: Path) -> subprocess.Popen[str]:
    """The command line, which starts the second process itself."""
    words = [sys.executable, "-m", "i2am_train", "train", *options, f"output={output}"]
    two = ["data.batch_size=2", "trainer.devices=2", "trainer.strategy=fsdp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*words, *two], env=environment, text=True, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def one(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    return train(compose("train", [*common, "data.batch_size=4", f"output={output}"]))


@pytest.fixture(scope="module")
def two(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two sharded processes."""
    output = tmp_path_factory.mktemp("two") / "run"
    finish(start(common, output))
    return output


def test_two_sharded_processes_equal_one(one: Path, two: Path, small_checkpoint: Path) -> None:
    """Every logged number, the models that are kept, and the checkpoints: as from one process."""
    assert len(curves(one)) == len(curves(two)) >= 5
    for expected, found in zip(curves(one), curves(two), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-5)
    logged = {name for row in curves(two) for name in row}
    assert logged >= {"loss/dcml", "loss/tv", "loss/cwg", "grad_norm", "val/imacs_g", "val/ssim"}
    begin = model_files(small_checkpoint)
    for name in ("model", "snapshots/step-000003", "best"):
        check_models(model_files(one / name), model_files(two / name), begin)
    assert TryOnModel.from_pretrained(two / "model").image_size == (64, 48)
    check_checkpoints(one / "checkpoints", two / "checkpoints")


def check_models(expected: dict[str, Any], found: dict[str, Any], begin: dict[str, Any]) -> None:
    """The same files, and weights apart by rounding alone."""
    assert found.keys() == expected.keys()
    texts = {file for file, value in expected.items() if isinstance(value, str)}
    assert {file: found[file] for file in texts} == {file: expected[file] for file in texts}
    assert distance(expected, found) < TOLERANCE * distance(expected, begin)


def check_checkpoints(one: Path, two: Path) -> None:
    """Whole tensors under the same names and numbers, AdamW's moments included, from the first process alone."""
    names = ["step-000002.ckpt", "step-000004.ckpt"]
    for folder in (one, two):
        assert sorted(path.name for path in folder.iterdir()) == names
    expected, found = (torch.load(folder / names[-1], weights_only=True) for folder in (one, two))
    assert found.keys() == expected.keys()
    for weights in ("state_dict", "averaged_weights"):
        torch.testing.assert_close(found[weights], expected[weights], rtol=1e-3, atol=1e-5)
    (expected,), (found,) = expected["optimizer_states"], found["optimizer_states"]
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_sharded_run_goes_on_bit_by_bit(common: list[str], two: Path, tmp_path: Path) -> None:
    """SIGTERM to one of the processes; the same command ends with the weights of the run that was not stopped."""
    stopped = start(common, tmp_path / "run")
    ends = time.monotonic() + 120
    while time.monotonic() < ends and stopped.poll() is None:
        file = tmp_path / "run" / "metrics.csv"
        if file.is_file() and any("loss/total" in row for row in curves(tmp_path / "run")):
            break
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 128 + signal.SIGTERM, errors[-3000:]
    assert list((tmp_path / "run/checkpoints").glob("interrupted-step-*.ckpt"))
    finish(start(common, tmp_path / "run"))
    expected, found = model_files(two / "model"), model_files(tmp_path / "run/model")
    assert distance(expected, found) == 0.0


@pytest.fixture
def alone() -> Iterator[None]:
    """Lets this process be a group of one, and leaves no trace of it."""
    before = dict(os.environ)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # A random rounding of 1e-7 in clipping; bfloat16's are 4e-3, and AdamW's first steps enlarge small gradients.
        (["optimization.trainable=v1", "optimization.gradient_checkpointing=true"], TOLERANCE),
        (["optimization.trainable=lora", "optimization.precision=bf16-mixed", "optimization.global_batch=8"], 0.1),
    ],
)  # fmt: skip
def test_options_that_go_together_with_sharding(
    common: list[str], small_checkpoint: Path, tmp_path: Path, options: list[str], tolerance: float
) -> None:
    """Frozen beside trained weights, recomputation, mixed precision, accumulation: as without sharding.

    In a group of one process, which is sharded in the same way.
    """
    more = [
        *common, *options, "data.batch_size=4", "optimization.steps=2", "validation.samples=0",
        "trainer.keep_best=null",
    ]  # fmt: skip
    plain, sharded = (
        train(compose("train", [*more, f"trainer.strategy={name}", f"output={tmp_path / name}"]))
        for name in ("auto", "fsdp")
    )  # fmt: skip
    begin, expected = model_files(small_checkpoint), model_files(plain / "model")
    found = model_files(sharded / "model")
    assert distance(expected, found) < tolerance * distance(expected, begin)
    for row, other in zip(curves(plain), curves(sharded), strict=True):
        assert other == pytest.approx(row, rel=tolerance)
    files = {str(path.relative_to(plain)) for path in plain.rglob("*.*")}
    assert files == {str(path.relative_to(sharded)) for path in sharded.rglob("*.*")}
