"""Training that is killed, told to stop, or goes wrong: nothing is lost, and the same command goes on bit by bit.

Real processes, stopped where a user or a scheduler would stop them.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from i2am_train.callbacks.interruption import requeue
from i2am_train.config.store import compose
from i2am_train.errors import ConfigError, DataError, FolderInUseError, RunFolderError, TrainingError
from i2am_train.evaluation.evaluator import GeneratedSamples
from i2am_train.workflows import train as workflow
from i2am_train.workflows.train import train
from tests.support.commands import Command, exit_status
from tests.support.trainings import SCHEDULED, curves, same_weights, weights

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]
LONG = ("optimization.steps=12", "validation.samples=0", "data.batch_size=4")
"""Twenty samples, four a step: five steps an epoch."""


def steps(folder: Path) -> list[int]:
    """Steps that the curves show, counted from 1; 0 before the first."""
    return sorted({0, *(int(row["step"]) + 1 for row in curves(folder) if "step" in row)})


def drawn_steps(folder: Path) -> list[int]:
    """Steps of the loss as TensorBoard shows them, counted from 0."""
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [event.step for event in shown.Scalars("loss/total")]


class Run(Command):
    """One attempt at a training run, as a process of its own."""

    def __init__(self, options: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> None:
        words = ["train", *options, f"output={output}"]
        super().__init__(words, output.with_suffix(".log"), environment)
        self.output = output

    def wait_for_step(self, step: int) -> None:
        """Until the curves show a step, or the process has ended."""
        until = time.monotonic() + 120
        while not self.ended and time.monotonic() < until:
            if steps(self.output)[-1] >= step:
                return
            time.sleep(0.02)

    def succeed(self) -> None:
        status, said = self.finish()
        assert status == 0, said[-3000:]


@pytest.fixture(scope="module")
def options(training: list[str]) -> list[str]:
    """A refined run with everything that has a state: averages, accumulation, readers, a checkpoint at every step."""
    return [
        *training, *LONG, "experiment=refined", *SCHEDULED, "optimization.ema_decay=0.9", "data.batch_size=2",
        "optimization.global_batch=4", "data.workers=2", "data.augment=true", "trainer.checkpoint_every_n_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return train(compose("train", [*options, f"output={output}"]))


def test_a_killed_run_ends_as_if_it_had_not_been(options: list[str], whole: Path, tmp_path: Path) -> None:
    """SIGKILL at three random moments, most of them inside an epoch; weights and curves equal the whole run's."""
    moments = random.Random(0)
    for step in sorted(moments.sample(range(1, 11), 3)):
        attempt = Run(options, tmp_path / "killed")
        attempt.wait_for_step(step)
        with pytest.raises(FolderInUseError, match=rf"in use .* process {attempt.process_id}, "):
            train(compose("train", [*options, f"output={tmp_path / 'killed'}"]))
        time.sleep(moments.random() * 0.3)
        attempt.stop(signal.SIGKILL)
    Run(options, tmp_path / "killed").succeed()
    assert same_weights(whole, tmp_path / "killed")
    assert curves(tmp_path / "killed") == curves(whole)
    assert steps(whole) == list(range(13))
    assert drawn_steps(tmp_path / "killed") == drawn_steps(whole) == list(range(12))
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.name.startswith(".")]


def crash() -> None:
    raise RuntimeError("the machine went down")


class Fault(L.Callback):
    """Lets something happen before a step: ends the process's work, as a crash would."""

    def __init__(self, step: int, happen: Callable[[], None]) -> None:
        self.step = step
        self.happen = happen

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.happen()


def stop_before_step(step: int, monkeypatch: pytest.MonkeyPatch, happen: Callable[[], None] = crash) -> None:
    """Trainers that are made from now on come to that step and no further."""
    make = workflow.make_trainer

    def make_failing(*arguments: Any) -> L.Trainer:
        trainer = make(*arguments)
        trainer.callbacks.insert(0, Fault(step, happen))
        return trainer

    monkeypatch.setattr(workflow, "make_trainer", make_failing)


def test_it_goes_on_from_any_step(
    options: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, at its last step and at the first of the next."""
    options = [*options, "data.workers=0"]
    for step in (2, 5, 6):  # an epoch has five steps
        output = tmp_path / str(step)
        with monkeypatch.context() as patch:
            stop_before_step(step, patch)
            with pytest.raises(RuntimeError, match="went down"):
                train(compose("train", [*options, f"output={output}"]))
        assert same_weights(whole, train(compose("train", [*options, f"output={output}"])))
        assert curves(whole) == curves(output)


def test_a_damaged_checkpoint_costs_a_step(
    options: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The run goes on from the one before and ends as it would have; the damaged one is kept."""
    options = [*options, "data.workers=0", f"output={tmp_path / 'run'}"]
    stop_before_step(6, monkeypatch)
    with pytest.raises(RuntimeError, match="went down"):
        train(compose("train", options))
    monkeypatch.undo()
    newest = tmp_path / "run/checkpoints/step-000006.ckpt"
    content = newest.read_bytes()[:-100]
    newest.write_bytes(content)
    capsys.readouterr()
    assert same_weights(whole, train(compose("train", options)))
    assert curves(whole) == curves(tmp_path / "run")
    assert f"{newest} is cut off" in capsys.readouterr().out
    assert newest.with_name("step-000006.ckpt.damaged").read_bytes() == content


def test_told_twice_it_stops_at_once(
    options: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A second Ctrl-C does not wait for the end of the step; what continues is said, and does."""
    options = [*options, "data.workers=0", f"output={tmp_path / 'run'}"]

    def interrupt_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    stop_before_step(6, monkeypatch, interrupt_twice)
    assert exit_status("train", options) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "i2am: SIGINT received: training was stopped at once, without saving. The same command goes on from the last "
        "checkpoint."
    )
    monkeypatch.undo()
    assert same_weights(whole, train(compose("train", options)))


def test_a_killed_reader_is_said(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As the system does where memory runs out."""

    def kill_reader() -> None:
        for process in multiprocessing.active_children():  # not the server of `Command`
            reader = psutil.Process(process.pid)
            reader.kill()
            psutil.wait_procs([reader])
        time.sleep(1)  # torch hears of it

    stop_before_step(1, monkeypatch, kill_reader)
    more = ["data.workers=1", f"output={tmp_path / 'run'}", "optimization.steps=12"]
    assert exit_status("train", [*options, *more]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("i2am: A process that helps this one was killed")


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_that_is_told_to_stop_says_what_continues(
    overrides: list[str], small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int,
) -> None:  # fmt: skip
    """Whole batches are kept, the lock is not."""
    write = GeneratedSamples.write

    def stop_after(samples: GeneratedSamples, *arguments: Any) -> None:
        write(samples, *arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(GeneratedSamples, "write", stop_after)
    options = [
        *overrides, f"checkpoint={small_checkpoint}", "device=cpu", "evaluation.metrics=[ssim]",
        "evaluation.batch_size=3", "progress_bar=false", "tracking=files", f"output={tmp_path / 'out'}",
    ]  # fmt: skip
    assert exit_status("evaluate", options) == 128 + number
    said = capsys.readouterr().err.splitlines()[-1]
    name = signal.Signals(number).name
    assert said == (
        f"i2am: {name} received: the command was stopped. The same command goes on with the batches that are not there "
        "yet."
    )
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_told_to_stop_it_saves_and_goes_on(
    options: list[str], whole: Path, tmp_path: Path, number: int, status: int
) -> None:
    """Without regular checkpoints: the state of the very step is saved, after whole accumulation."""
    options = [*options, "trainer.checkpoint_every_n_steps=1000"]
    attempt = Run(options, tmp_path / "stopped")
    attempt.wait_for_step(5)
    returned, errors = attempt.stop(number)
    assert returned == status
    assert "training stopped after step" in errors
    assert "The same command continues it." in errors
    (saved,) = (tmp_path / "stopped/checkpoints").glob("interrupted-step-*.ckpt")
    assert int(saved.stem.rpartition("-")[2]) >= 5
    Run(options, tmp_path / "stopped").succeed()
    assert same_weights(whole, tmp_path / "stopped")
    assert curves(whole) == curves(tmp_path / "stopped")
    assert not list((tmp_path / "stopped/checkpoints").glob("interrupted*"))


def scontrol(folder: Path, status: int) -> str:
    """A PATH with an `scontrol` that writes its words into ``folder/said``."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/said\nexit {status}\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_a_job_of_slurm_saves_and_asks_to_be_started_again(training: list[str], tmp_path: Path) -> None:
    """Lightning in SLURM's environment; the array's task is named, and one checkpoint is all that is left."""
    options = [*training, *LONG, "trainer.checkpoint_every_n_steps=1000"]
    slurm = {
        "SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "PATH": scontrol(tmp_path, 0),
    }  # fmt: skip
    attempt = Run(options, tmp_path / "run", slurm)
    attempt.wait_for_step(3)
    returned, errors = attempt.stop(signal.SIGUSR1)
    assert returned == 128 + signal.SIGUSR1
    assert "SIGUSR1 received: training stopped after step" in errors
    assert (tmp_path / "said").read_text() == "requeue 7_3\n"
    Run(options, tmp_path / "run", slurm).succeed()
    assert steps(tmp_path / "run") == list(range(13))


def test_slurm_may_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is saved by then, and the user is told what to do."""
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    monkeypatch.setenv("PATH", scontrol(tmp_path, 1))
    with pytest.warns(UserWarning, match=r"take job 70 back .*status 1.*Submit it again"):
        requeue()
    assert (tmp_path / "said").read_text() == "requeue 70\n"


def test_the_latest_checkpoints_and_the_best_model_are_kept(training: list[str], tmp_path: Path) -> None:
    options = [*training, "trainer.checkpoint_every_n_steps=1", "trainer.keep_checkpoints=2", "trainer.keep_best=ssim"]
    run = train(compose("train", [*options, f"output={tmp_path / 'run'}"]))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-000003.ckpt", "step-000004.ckpt"]
    scores = [row["val/ssim"] for row in curves(run) if "val/ssim" in row]
    assert len(scores) == 2
    record = json.loads((run / "best.json").read_text())
    assert record == {
        "score": "ssim", "value": pytest.approx(max(scores)), "step": 2 if scores[0] >= scores[1] else 4,
    }  # fmt: skip
    best = load_file(run / "best/unet/diffusion_pytorch_model.safetensors")
    last = weights(run)
    assert all(torch.equal(best[name], last[name]) for name in best) == (scores[1] > scores[0])


class Poison:
    """Makes one loss or gradient infinite, at the third step."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, make: Callable[..., Any]) -> Callable[..., Any]:
        class Callback(L.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
                if trainer.global_step == 2 and where == "loss":
                    batch["person"][0, 0, 0, 0] = torch.nan

            def on_after_backward(self, trainer: Any, module: Any) -> None:
                if trainer.global_step == 2 and where == "gradient":
                    module.model.unet.conv_in.weight.grad[0, 0, 0, 0] = torch.inf

        where = self.where

        def made(*arguments: Any) -> Any:
            trainer = make(*arguments)
            trainer.callbacks.insert(0, Callback())
            return trainer

        return made


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_changes_a_weight(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Said with step and samples; the saved weights are those of the last good step."""
    options = [*training, "validation.samples=0", "experiment=refined"]
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "make_trainer", Poison(where)(workflow.make_trainer))
        with pytest.raises(TrainingError, match=rf"The {where} became .* in step 3, on samples \d{{5}}"):
            train(compose("train", [*options, f"output={tmp_path / 'run'}"]))
    diagnosis = json.loads((tmp_path / "run/rank0-diagnosis.json").read_text())
    assert diagnosis["step"] == 2
    assert len(diagnosis["samples"]) == 8
    if where == "gradient":
        assert diagnosis["parameters"] == ["model.unet.conv_in.weight"]
    kept = torch.load(tmp_path / "run/checkpoints/not-finite.ckpt", weights_only=False)
    assert kept["global_step"] == 2
    assert all(bool(value.isfinite().all()) for value in kept["state_dict"].values())


def test_too_little_memory_names_what_helps(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that torch raises on a GPU; none is at hand here."""

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr("i2am_train.training.step._denoising", exhausted)
    with pytest.raises(TrainingError, match=r"step 1: CUDA out of memory.*global_batch.*gradient_checkpointing.*bf16"):
        train(compose("train", [*training, f"output={tmp_path / 'run'}"]))


def test_what_cannot_work_is_refused_before_anything_is_written(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (
            "global_batch=12 is not a multiple of data.batch_size=8 times 1",
            ["optimization.global_batch=12"],
        ),
        (
            r"keep_best=fid is no score.*For fid, add it to evaluation.metrics",
            ["trainer.keep_best=fid"],
        ),
        (r"keep_best=entropy is no score.*one of imacs_g", ["trainer.keep_best=entropy"]),
        (
            "keep_best=imacs_g needs validation, and validation.samples is 0",
            ["trainer.keep_best=imacs_g", "validation.samples=0"],
        ),
        ("needs a CUDA device", ["optimization.optimizer=adamw8bit"]),
        ("An epoch would have no batch: trainer.limit_train_batches=0.3", ["trainer.limit_train_batches=0.3"]),
    ]  # fmt: skip
    for message, more in cases:
        with pytest.raises(ConfigError, match=message):
            train(compose("train", [*training, *more, f"output={tmp_path / 'run'}"]))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with pytest.raises(ConfigError, match=r"has 0.0 GiB free, and this run will keep about"):
        train(compose("train", [*training, f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", ["0", "0.0"])
def test_training_of_nothing_is_refused(training: list[str], limit: str) -> None:
    with pytest.raises(ConfigError, match=r"limit_train_batches=0.*0 trains nothing"):
        compose("train", [*training, f"trainer.limit_train_batches={limit}"])


def test_a_training_that_ends_early_saves_no_model(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: here the trainer is told to stop."""
    make = workflow.make_trainer

    def make_stopping(*arguments: Any) -> L.Trainer:
        trainer = make(*arguments)
        trainer.callbacks.insert(0, Fault(2, lambda: setattr(trainer, "should_stop", True)))
        return trainer

    monkeypatch.setattr(workflow, "make_trainer", make_stopping)
    with pytest.raises(TrainingError, match=r"ended after 3 of 4 steps.*No model was saved"):
        train(compose("train", [*training, f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run/model").exists()


def test_an_output_among_the_data_is_refused(training: list[str], small_dataset: Path, tmp_path: Path) -> None:
    """It would change the dataset with every file, and could never go on; through links, too, and vice versa."""
    before = sorted(small_dataset.rglob("*"))
    (tmp_path / "link").symlink_to(small_dataset / "train")
    elsewhere = f"output={tmp_path / 'run'}"
    for options, message in (
        ([f"output={small_dataset / 'test' / 'run'}"], "lies among the data"),
        ([f"output={tmp_path / 'link' / 'run'}"], "lies among the data"),
        ([elsewhere, f"tracking.folder={small_dataset}"], f"The data in {small_dataset} lie inside"),
        ([elsewhere, f"data.cache_copies={small_dataset / 'train'}"], "lies among the data"),
        ([f"output={small_dataset.parent}"], f"The data in {small_dataset} lie inside"),
    ):
        with pytest.raises(RunFolderError, match=message):
            train(compose("train", [*training, *options]))
    assert sorted(small_dataset.rglob("*")) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "part"), [(3, "1 of 16"), (18, "1 of 4")])
def test_a_missing_picture_is_found_before_the_first_step(
    training: list[str], small_dataset: Path, tmp_path: Path, number: int, part: str
) -> None:
    """Of training, and of the samples held out for validation, which the first epoch would never read."""
    root = shutil.copytree(small_dataset, tmp_path / "data")
    (root / f"train/cloth/{number:05d}_00.jpg").unlink()
    options = [*training, f"data.root={root}", f"output={tmp_path / 'run'}"]
    with pytest.raises(DataError, match=rf"{part} in cloth \({number:05d}_00\.jpg\)"):
        train(compose("train", options))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_measures_and_writes_nothing(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from i2am_train.workflows.train import run

    more = ["dry_run=true", "optimization.global_batch=16", "optimization.trainable=cross_attention"]
    run(compose("train", [*training, *more, f"output={tmp_path / 'run'}"]))
    printed = capsys.readouterr().out
    for part in (
        "global_batch: 16",
        "16 = 8 x 1 processes x 2 accumulated",
        "0.0 M of them trained",
        "s a step",
        "GiB at most on CPU",
    ):
        assert part in printed
    assert not (tmp_path / "run").exists()
