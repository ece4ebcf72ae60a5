"""The recipe of the shipped model: scripts/train_tiny_model.py and scripts/training_steps.py."""

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from i2am_train.attention.trace import ScoreTap
from i2am_train.errors import CheckpointError, ConfigError, TrainingError
from i2am_train.losses.attention import attention_on_grids
from i2am_train.losses.literature import supervised
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.types import GridSize
from tests.support.tiny_training import encoded_data, options, script

RECIPE, STEPS = script(), script("training_steps")


# ---- optimizers -------------------------------------------------------------------------------------------------


def test_muon_is_torchs() -> None:
    """Wide and tall matrices, several of a shape, at a rate that changes; and it goes on from torch's state.

    An update's root mean square is about 0.2 of the rate. On another machine single elements may round differently,
    where the products of several matrices are not computed like that of one.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = [(16, 96), (16, 96), (96, 16), (8, 64), (32, 80)]
    theirs = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    ours = [nn.Parameter(matrix.detach().clone()) for matrix in theirs]
    reference = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    muon = STEPS.Muon(ours, lr=1.0)
    for number, rate in enumerate((0.5, 0.02, 0.1)):
        if number == 2:
            muon = STEPS.Muon(ours, lr=1.0)
            muon.load_state_dict(deepcopy(reference.state_dict()))
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape, generator=draw)
            mine.grad = other.grad.clone()
        reference.param_groups[0]["lr"] = rate
        muon.param_groups[0]["lr"] = torch.tensor(rate)
        reference.step()
        muon.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).abs().mean() < 1e-4 * rate


def test_a_matrix_without_gradient_stays() -> None:
    still, moved = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    moved.grad = torch.ones(2, 3)
    STEPS.Muon([still, moved], lr=0.1).step()
    assert torch.equal(still, torch.ones(2, 3))
    assert not torch.equal(moved, torch.ones(2, 3))


# ---- the denoiser's step ------------------------------------------------------------------------------------------


def plain_training(model: TryOnModel, data: dict[str, Tensor], steps: int, seeded: int) -> Any:
    """The recipe written down once more, in float32: numbers in place of tensors, samples picked by masks."""
    trained = nn.ModuleList([model.unet, model.reference_encoder, model.projector])
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    weights = list(trained.parameters())
    matrices = [(w, nn.Parameter(w.data.view(len(w), -1))) for w in weights if w.ndim in (2, 4)]
    muon = torch.optim.Muon([m for _, m in matrices], lr=1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([w for w in weights if w.ndim not in (2, 4)], betas=(0.9, 0.98), fused=True)
    losses = []
    with ScoreTap(model, model.attention_recipe(), [2, 5]) as tap:
        for step in range(steps):
            draw = torch.Generator().manual_seed(1000 + step)
            rows = torch.randint(len(data["garment"]), (4,), generator=draw)
            noise = torch.randn(4, 4, 16, 12, generator=draw)
            times = ((1 - torch.rand(4, generator=draw) ** 1.4) * 1000).long().clamp_max(999)
            kept = torch.rand(4, generator=draw) >= 0.1
            clean, agnostic, pose = (data[name][rows].float() for name in ("person", "agnostic", "densepose"))
            garment = data["garment"][rows].permute(0, 3, 1, 2).float() / 127.5 - 1
            tokens = model.projector.drop(model.encode_reference(garment), ~kept)
            noisy = model.schedule.noised(clean, noise, times)
            prediction = model.denoise(noisy, times, Conditions(agnostic, pose, tokens))
            loss = (prediction - model.schedule.target(clean, noise, times)).square().mean()
            losses.append(loss.item())
            hint = min(1.0, max(0.0, 2 - 2 * step / max(seeded, 1))) if step < seeded else 0.0
            for layer, grid in ((2, GridSize(4, 3)), (5, GridSize(8, 6))):
                scores, true = tap.scores(layer)[kept], data[f"target_{layer}"][rows][kept]
                everywhere = torch.ones(scores.shape[:2], dtype=torch.bool)
                attention = attention_on_grids(scores, everywhere, grid, GridSize(8, 6), target=true)
                loss = loss + 0.03 * hint * supervised(attention).mean()
            trained.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for weight, matrix in matrices:
                matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
            factor = min((step + 1) / 100, 1.0, max((steps - step) / (0.35 * steps), 0.02))
            muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 4e-3 * factor, 2e-3 * factor
            muon.step()
            adamw.step()
            average.update_parameters(trained)
    return losses, trained.state_dict(), average.state_dict(), [muon.state_dict(), adamw.state_dict()]


@pytest.mark.parametrize("seeded", [8, 0], ids=["hinted", "without the hint"])
def test_steps_are_those_of_the_recipe(
    make_small_model: Callable[..., Any], seeded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, weights and averages of three steps, without bfloat16 and what it makes of a last bit: the hint's mean
    adds in another order than the plain loop's, and learning rates are float32."""
    monkeypatch.setattr(RECIPE, "half_precision", nullcontext)
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda matrix, *_: matrix / matrix.norm())
    monkeypatch.setattr(STEPS, "orthogonalised", lambda many: many / many.norm(dim=(1, 2), keepdim=True))
    data = encoded_data()
    losses, *expected = plain_training(make_small_model(), data, 3, seeded)
    given = options(tmp_path, "--steps", "3", "--seeded-steps", str(seeded), "--save-every", "1")
    model = make_small_model()
    networks = nn.ModuleList([model.unet, model.reference_encoder, model.projector])
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    RECIPE.train_denoiser(model, data, given)
    rows = [json.loads(line) for line in (given.work / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=6e-5)  # four digits
    assert all((row["seeding"] > 0) is (seeded > 0) for row in rows)
    state = torch.load(given.work / "denoiser.pt", weights_only=True)
    assert state["average"].keys() == expected[1].keys()  # states of earlier versions stay readable
    for found, wanted, prefix in zip((state["trained"], state["average"]), expected[:2], ("", "module."), strict=True):
        for name, start in before.items():
            way = (wanted[prefix + name] - start).norm()
            off = (found[prefix + name] - wanted[prefix + name]).norm()
            assert off < 1e-3 * way + 1e-8, name


def test_a_state_of_the_plain_loop_is_continued(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """What earlier versions of the script saved: torch's Muon, learning rates as numbers."""
    _, trained, average, optimizers = plain_training(make_small_model(), encoded_data(), 1, 0)
    given = options(tmp_path, "--steps", "2")
    torch.save(
        {"trained": trained, "average": average, "optimizers": optimizers, "step": 1}, given.work / "denoiser.pt"
    )
    (given.work / "log.jsonl").write_text('{"step": 0, "loss": 1.5, "seeding": 0.0}\n')
    RECIPE.train_denoiser(make_small_model(), encoded_data(), given)
    state = torch.load(given.work / "denoiser.pt", weights_only=True)
    assert state["step"] == 2
    assert state["optimizers"][1]["state"][0]["step"] == 2
    assert [json.loads(line)["step"] for line in (given.work / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert TryOnModel.from_pretrained(given.output).image_size == GridSize(64, 48)


def test_stopped_and_continued_equals_one_run(
    make_small_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 3, after a state at step 2: weights, averages, momenta and log are the same, bit by bit."""
    words = ("--steps", "4", "--seeded-steps", "3", "--save-every", "2")
    whole, stopped = options(tmp_path / "whole", *words), options(tmp_path / "stopped", *words)
    RECIPE.train_denoiser(make_small_model(), encoded_data(), whole)
    draws = RECIPE.denoiser_draws

    def killed(step: int, *args: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return draws(step, *args)

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(RECIPE, "denoiser_draws", killed)
        RECIPE.train_denoiser(make_small_model(), encoded_data(), stopped)
    assert torch.load(stopped.work / "denoiser.pt", weights_only=True)["step"] == 2
    RECIPE.train_denoiser(make_small_model(), encoded_data(), stopped)
    torch.testing.assert_close(
        *(torch.load(given.work / "denoiser.pt", weights_only=True) for given in (stopped, whole)), rtol=0, atol=0
    )
    assert (stopped.work / "log.jsonl").read_text() == (whole.work / "log.jsonl").read_text()


def test_a_loss_that_is_not_finite_is_not_saved(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    data = encoded_data()
    data["person"][:] = torch.inf
    given = options(tmp_path, "--steps", "2")
    with pytest.raises(TrainingError, match="Step 0 of the denoiser gives"):
        RECIPE.train_denoiser(make_small_model(), data, given)
    assert not (given.work / "denoiser.pt").exists()


@pytest.mark.parametrize(
    ("step", "seeded", "expected"), [(0, 600, 1.0), (300, 600, 1.0), (450, 600, 0.5), (600, 600, 0.0), (0, 0, 0.0)]
)
def test_the_hint_fades(step: int, seeded: int, expected: float) -> None:
    assert RECIPE.seed_weight(step, seeded) == expected


# ---- data and VAE -------------------------------------------------------------------------------------------------


def test_drawing_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, of which those that are there are kept; more samples begin with the same ones."""
    size = GridSize(64, 48)
    monkeypatch.setattr(RECIPE, "CHUNK", 2)
    monkeypatch.setattr(RECIPE, "machine", lambda: {"cores": 1})
    expected = [RECIPE.render(index, size) for index in range(5)]
    first = RECIPE.render_all(3, size, tmp_path)
    assert {name: len(values) for name, values in first.items()} == dict.fromkeys(expected[0], 3)
    drawn: list[int] = []

    def render(index: int, size: GridSize) -> dict[str, np.ndarray]:
        drawn.append(index)
        return expected[index]

    monkeypatch.setattr(RECIPE, "render", render)
    more = RECIPE.render_all(5, size, tmp_path)
    assert drawn == [2, 3, 4]
    for name, values in more.items():
        np.testing.assert_array_equal(values.numpy(), np.stack([sample[name] for sample in expected]))
        assert torch.equal(values[:3].nan_to_num(), first[name].nan_to_num())
    assert more["target_2"].shape == (5, 4 * 3, 2)
    assert more["target_5"].shape == (5, 8 * 6, 2)


def test_data_in_one_file_are_read(tmp_path: Path) -> None:
    """As earlier versions wrote them; of another size they are refused."""
    save_file({"person": torch.zeros(7, 64, 48, 3, dtype=torch.uint8)}, tmp_path / "data-7.safetensors")
    assert list(RECIPE.render_all(7, GridSize(64, 48), tmp_path)) == ["person"]
    with pytest.raises(ConfigError, match="has pictures of 64x48, --size is 128x96"):
        RECIPE.render_all(7, GridSize(128, 96), tmp_path)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    samples = [RECIPE.render(index, GridSize(64, 48)) for index in range(3)]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def test_the_vae_goes_on_after_a_stop(
    make_small_model: Callable[..., Any], drawn: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--vae-steps", "3", "--save-every", "1")
    whole, stopped = options(tmp_path / "whole", *words), options(tmp_path / "stopped", *words)
    RECIPE.train_vae(make_small_model(), drawn, whole)
    trapezoid = RECIPE.trapezoid

    def killed(step: int, steps: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return float(trapezoid(step, steps))

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(RECIPE, "trapezoid", killed)
        RECIPE.train_vae(make_small_model(), drawn, stopped)
    assert not (stopped.work / "vae.pt").exists()
    RECIPE.train_vae(make_small_model(), drawn, stopped)
    found, expected = (torch.load(given.work / "vae.pt", weights_only=True) for given in (stopped, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    start = make_small_model().vae.state_dict()
    assert not torch.equal(found["decoder.conv_out.weight"], start["decoder.conv_out.weight"])


def test_latents_are_those_of_the_models_vae(
    make_small_model: Callable[..., Any], drawn: dict[str, Tensor], tmp_path: Path
) -> None:
    model = make_small_model()
    RECIPE.set_scaling_factor(model, drawn["person"])
    data = RECIPE.encode_all(model, drawn, tmp_path)
    assert set(data) == set(drawn)
    kept = load_file(tmp_path / "latents-3.safetensors")
    for name in ("person", "agnostic", "densepose"):
        exact = model.encode_latents(drawn[name].permute(0, 3, 1, 2).float() / 127.5 - 1)
        assert (data[name] - exact).abs().mean() < 0.02  # bfloat16
        assert torch.equal(data[name], kept[name])
    assert data["person"].float().std().item() == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        model.vae.quant_conv.bias += 1.0
    with pytest.raises(ConfigError, match="not those of this model's VAE"):
        RECIPE.encode_all(model, drawn, tmp_path)


# ---- the command ------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the program says of its input; status 2."""
    monkeypatch.setattr("sys.argv", ["train_tiny_model.py", *words])
    with pytest.raises(SystemExit, match=r"^2$"):
        RECIPE.main()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--start", "nowhere"], "'nowhere' is no try-on model"),
        (["--device", "cuda"], "finds no CUDA device"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--size", "64"], "'64' is no size like 128x96"),
        (["--size", "100x96"], "multiples of 16"),
        (["--steps", "0"], "'0' is no whole number from 1"),
        (["--seeded-steps", "-1"], "'-1' is no whole number from 0"),
        (["--learning-rate", "nan"], "'nan' is no number above 0"),
        (["--output", "."], "'.' exists and is no model"),
        (["--start", "CHECKPOINT", "--size", "128x96"], "is for pictures of 64x48, and --size is 128x96"),
    ],
)
def test_bad_input(
    words: list[str],
    reason: str,
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One paragraph, before anything is drawn."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    given = [str(small_checkpoint) if word == "CHECKPOINT" else word for word in words]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    said = refusal(capsys, monkeypatch, "--work", str(tmp_path / "work"), "--output", str(tmp_path / "model"), *given)
    assert reason in said
    assert "Traceback" not in said
    assert not list((tmp_path / "work").glob("*"))


def test_a_state_of_another_size(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    given = options(tmp_path, "--steps", "1")
    model = make_small_model()
    state = nn.ModuleList([model.unet, model.reference_encoder, model.projector]).state_dict()
    state["2.null_tokens"] = torch.zeros(1, 192, 32)
    torch.save({"trained": state, "step": 1}, given.work / "denoiser.pt")
    with pytest.raises(CheckpointError, match=r"the state of another model .*null_tokens.* Give the --size"):
        RECIPE.train_denoiser(model, encoded_data(), given)


@pytest.mark.long
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to a model, whose data two processes draw; then from that model on."""
    monkeypatch.setattr(RECIPE, "CHUNK", 2)
    given = ["--size", "64x48", "--samples", "3", "--vae-steps", "1", "--steps", "2", "--batch", "2", "--device", "cpu"]
    for work, cores, start in (("first", 2, []), ("second", 1, ["--start", str(tmp_path / "first model")])):
        monkeypatch.setattr(RECIPE, "machine", lambda cores=cores: {"cores": cores})
        places = ["--work", str(tmp_path / work), "--output", str(tmp_path / f"{work} model")]
        monkeypatch.setattr("sys.argv", ["train_tiny_model.py", *given, *places, *start])
        RECIPE.main()
        said = capsys.readouterr().out
        assert "denoiser: 2 steps in" in said
        assert "a second, on" in said
    models = [TryOnModel.from_pretrained(tmp_path / f"{work} model") for work in ("first", "second")]
    for first, second in zip(*(model.vae.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(*(model.unet.conv_out.weight for model in models))
    logs = [(tmp_path / work / "log.jsonl").read_text().splitlines() for work in ("first", "second")]
    hints = [json.loads(log[0])["seeding"] for log in logs]
    assert hints[0] > 0
    assert hints[1] == 0
