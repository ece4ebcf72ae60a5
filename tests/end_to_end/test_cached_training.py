"""`i2am data cache`, then `i2am train data.cache=`: the same training without the frozen encoders."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from i2am_train.cli import main
from i2am_train.config.store import compose
from i2am_train.errors import DataError
from i2am_train.workflows import train as workflow
from i2am_train.workflows.data import cache
from i2am_train.workflows.train import train
from tests.support.trainings import curves

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations
REFINED = (
    "experiment=refined", "objective.terms.supervised=0.1", "validation.samples=0", "optimization.steps=3",
)  # fmt: skip


@pytest.fixture
def make(small_dataset: Path, small_checkpoint: Path, tmp_path: Path) -> Callable[..., str]:
    """Makes a cache and gives the option that uses it."""

    def run(*more: str) -> str:
        output = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        options = [f"root={small_dataset}", f"init={small_checkpoint}", f"output={output}"]
        cache(compose("data_cache", [*options, "workers=0", "batch_size=8", "progress_bar=false", *more]))
        return f"data.cache={output}"

    return run


def trained(options: Sequence[str], output: Path) -> dict[str, torch.Tensor]:
    folder = train(compose("train", [*options, f"output={output}"]))
    return {
        f"{part}.{name}": value
        for part in ("unet", "projector")
        for name, value in load_file(folder / "model" / part / "diffusion_pytorch_model.safetensors").items()
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def forbid_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call of a frozen encoder is an error."""
    make_module = workflow.make_module

    def called(*_: Any) -> None:
        raise AssertionError("a frozen encoder was run")

    def made(config: Any) -> Any:
        module = make_module(config)
        for network in (module.model.vae.encoder, module.model.reference_encoder):
            network.register_forward_pre_hook(called)
        return module

    monkeypatch.setattr(workflow, "make_module", made)


def test_three_steps_from_the_cache_are_those_without(
    training: list[str], make: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit with float32 on a CPU and one batch size; the hooks that forbid the encoders work."""
    options = [*training, *REFINED]
    used = make()
    uncached = trained(options, tmp_path / "uncached")
    forbid_encoders(monkeypatch)
    cached = trained([*options, used], tmp_path / "cached")
    assert largest_difference(uncached, cached) == 0
    start = load_file(
        Path(next(o for o in training if o.startswith("init=")).removeprefix("init="))
        / "unet/diffusion_pytorch_model.safetensors"
    )
    assert any(not torch.equal(cached[f"unet.{name}"], value) for name, value in start.items())
    with pytest.raises(AssertionError, match="a frozen encoder was run"):
        trained(options, tmp_path / "forbidden")


@pytest.mark.long
def test_adapters_from_the_cache_are_those_without(
    training: list[str], make: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA with attention losses: bit by bit, and no frozen encoder is run."""
    options = [*training, *REFINED, "optimization.trainable=lora", "optimization.lora_rank=2"]
    used = make()
    trained(options, tmp_path / "uncached")
    forbid_encoders(monkeypatch)
    trained([*options, used], tmp_path / "cached")
    uncached, cached = (
        load_file(tmp_path / name / "lora/pytorch_lora_weights.safetensors") for name in ("uncached", "cached")
    )
    assert largest_difference(uncached, cached) == 0
    moved = [name for name, value in cached.items() if ".lora_B." in name and value.any()]
    assert moved


def test_half_precision_is_near(training: list[str], make: Callable[..., str], tmp_path: Path) -> None:
    """Adam's first steps move a weight by the learning rate whatever the gradient: some may move the other way."""
    options = [*training, *REFINED]
    one, other = (
        trained([*options, *more], tmp_path / f"run{number}")
        for number, more in enumerate([[], [make("dtype=float16")]])
    )
    moved = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    assert 0 < moved.max() < 3 * 2 * 3e-4
    assert moved.mean() < 0.1 * 3e-4


@pytest.mark.long
def test_augmented_epochs_from_variants_are_those_without(
    training: list[str], make: Callable[..., str], tmp_path: Path
) -> None:
    """As many epochs as there are variants, with the same seed; read by a worker process."""
    options = [
        *training, *REFINED, "data.augment=true", "optimization.steps=4", "seed=2", "data.workers=1",
    ]  # fmt: skip
    uncached = trained(options, tmp_path / "uncached")
    cached = trained([*options, make("variants=2", "seed=2")], tmp_path / "cached")
    assert largest_difference(uncached, cached) == 0


@pytest.mark.long
def test_validation_reads_pictures(training: list[str], make: Callable[..., str], tmp_path: Path) -> None:
    """The scores are those of an uncached run, and so are the weights."""
    used = make()
    logged = []
    for name, more in (("uncached", []), ("cached", [used])):
        trained([*training, "experiment=refined", *more], tmp_path / name)
        logged.append(curves(tmp_path / name))
    assert any("val/imacs_g" in row for row in logged[0])
    assert logged[0] == logged[1]


def test_what_does_not_fit_is_refused_before_anything_is_written(
    training: list[str], make: Callable[..., str], tmp_path: Path
) -> None:
    used = make()
    options = [*training, *REFINED, used, f"output={tmp_path / 'run'}"]
    for more, message in (
        (["data.augment=true"], "encoded samples cannot be augmented"),
        (["data.fit=pad"], "reading all; stretch instead of all; pad"),
        (["data.cache=/nowhere"], "There is no cache in /nowhere"),
    ):
        with pytest.raises(DataError, match=message):
            train(compose("train", [*options, *more]))
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_stops_training_and_is_named(
    training: list[str], make: Callable[..., str], tmp_path: Path
) -> None:
    used = make("shard_samples=4")
    shard = Path(used.removeprefix("data.cache=")) / "train-000004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000:] = bytes(byte ^ 1 for byte in content[-1000:])
    shard.write_bytes(content)
    options = [*training, *REFINED, used, f"output={tmp_path / 'run'}", "optimization.steps=10"]
    with pytest.raises(DataError, match=rf"{shard.name} is damaged"):
        train(compose("train", options))


def test_the_command_line(
    small_dataset: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says what was made and how to use it."""
    words = ["cache", f"root={small_dataset}", f"init={small_checkpoint}", "splits=[train,test]"]
    more = [f"output={tmp_path / 'cache'}", "workers=1", "shard_samples=15", "progress_bar=false"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", *words, *more])
    printed = capsys.readouterr().out
    assert "20 train and 6 test samples in 3 shards" in printed
    assert f"data.cache={tmp_path / 'cache'}" in printed
