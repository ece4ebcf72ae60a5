"""`i2am train optimization.compile=true` from start to end: curves, validation, averages, stopping and going on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trainings import SCHEDULED, curves, weights

pytestmark = pytest.mark.slow  # two minutes: the network is traced twice

SCRIPT = """
import functools, json, sys
import lightning as L
import torch
from i2am_train.workflows import train as workflow
from i2am_train.workflows.train import train
from i2am_train.config.store import compose
from i2am_train.attention.compiled import compiled_graphs
from tests.support.trainings import curves, weights

# Everything but the code that inductor writes, whose C++ takes minutes to compile (see test_attention_compiled.py).
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")


class Fault(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            raise RuntimeError("the machine went down")


def failing(*arguments, make=workflow.make_trainer):
    trainer = make(*arguments)
    trainer.callbacks.insert(0, Fault())
    return trainer


folder, options = sys.argv[1], sys.argv[2:]
train(compose("train", [*options, f"output={folder}/eager"]))
options = [*options, "optimization.compile=true", f"output={folder}/compiled"]
graphs, usual = [compiled_graphs()], workflow.make_trainer
workflow.make_trainer = failing
try:
    train(compose("train", options))
except RuntimeError as error:
    print(error)
graphs.append(compiled_graphs())
workflow.make_trainer = usual
torch.compiler.reset()  # as in a process of its own
train(compose("train", options))
print(json.dumps([*graphs, compiled_graphs()]))
"""


def test_a_compiled_run_is_the_eager_one(training: list[str], tmp_path: Path) -> None:
    """Refined losses, checkpointed gradients, averages, two validations; it went down after the first and went on.

    Eight graphs in each of the two attempts, all of its first step: four shapes of a block, and the two layers that are
    listened to, which run again in the backward pass, unheard. Validation, which listens to all, neither runs nor makes
    one.
    """
    options = [
        *training, "experiment=refined", *SCHEDULED, "data.batch_size=4", "optimization.steps=8",
        "optimization.ema_decay=0.9",
        "optimization.gradient_checkpointing=true", "trainer.checkpoint_every_n_steps=1", "tracking.tensorboard=false",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), *options],
        capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the machine went down" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 8, 16]
    eager, compiled = curves(tmp_path / "eager"), curves(tmp_path / "compiled")
    assert sum("val/imacs_g" in row for row in eager) == 2
    assert [row["step"] for row in compiled if "loss/total" in row] == list(range(8))
    assert len(eager) == len(compiled)
    for one, other in zip(eager, compiled, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    one, other = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
