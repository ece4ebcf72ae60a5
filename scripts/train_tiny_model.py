"""The recipe of the shipped tiny model: renders its data in memory, trains the VAE, then the denoiser.

    python scripts/train_tiny_model.py --work runs/tiny_model --output data/weights/tiny

Stopped and started again with the same --work it goes on where it was. The denoiser is trained on the denoising loss;
for the first ``--seeded-steps`` steps layers 2 and 5 also see the true correspondence (cross-entropy to a Gaussian),
because a model this small finds the garment several times sooner with that hint. The hint then fades and is gone for
the rest of the run, in which these layers drift wherever the denoising loss lets them: the paper's starting point.
Quality figures of the result come from ``i2am evaluate``.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from i2am_train.attention.trace import ScoreTap
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.losses.attention import attention_on_grids, supervised
from i2am_train.metrics.attention import target_on_grid
from i2am_train.models.architecture import build_model
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.types import GridSize

SIZE = GridSize(128, 96)
SEEDED_LAYERS = {2: GridSize(8, 6), 5: GridSize(16, 12)}  # paper number: grid
DATA_SEED = 20_000  # not a seed of 'i2am data make': the shipped model has seen none of its images


def render(index: int, size: GridSize) -> dict[str, np.ndarray]:
    """One training sample: four pictures, and the true reference position of each cell of the seeded layers."""
    sample = render_sample(DATA_SEED, index, size)
    truth = torch.from_numpy(sample.correspondence)[None]
    mask = torch.from_numpy(sample.warped_garment_mask)[None]
    reference = GridSize(size.height // 8, size.width // 8)
    pictures = {name: getattr(sample, name) for name in ("person", "agnostic", "densepose", "garment")}
    targets = {
        f"target_{layer}": target_on_grid(truth, mask, grid, reference)[0].numpy()
        for layer, grid in SEEDED_LAYERS.items()
    }
    return pictures | targets


def render_all(count: int, work: Path) -> dict[str, Tensor]:
    """``count`` samples, stacked; pictures are uint8 [count, height, width, 3]."""
    file = work / f"data-{count}.safetensors"
    if file.exists():
        return load_file(file)
    with ProcessPoolExecutor(2, initializer=partial(torch.set_num_threads, 1)) as pool:
        jobs = pool.map(partial(render, size=SIZE), range(count), chunksize=32)
        rows = list(tqdm(jobs, total=count, desc="rendering", mininterval=5))
    data = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    save_file(data, file)
    return data


def pictures(batch: Tensor) -> Tensor:
    """uint8 [batch, height, width, 3] as float [batch, 3, height, width] in [-1, 1], channels last in memory."""
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


def trapezoid(step: int, steps: int, warmup: int = 50, decay: float = 0.35) -> float:
    """Learning-rate factor: linear up, flat, linear down to 2 % over the last ``decay`` of the run."""
    down = (steps - step) / (decay * steps)
    return min((step + 1) / warmup, 1.0, max(down, 0.02))


def save_state(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


class Optimizers:
    """Muon for every matrix and convolution, AdamW for biases, norms and other vectors.

    On this data Muon brings the VAE as far in 300 steps as AdamW in 2,000. A convolution is the matrix of its output
    channels by everything else, a view that shares its memory.
    """

    def __init__(self, module: nn.Module, matrix_rate: float, vector_rate: float) -> None:
        self.parameters = list(module.parameters())
        self.views = [
            (weight, nn.Parameter(weight.data.view(len(weight), -1)))
            for weight in self.parameters
            if weight.ndim in (2, 4)
        ]
        vectors = [weight for weight in self.parameters if weight.ndim not in (2, 4)]
        self.parts = (
            torch.optim.Muon(
                [view for _, view in self.views], lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(vectors, lr=vector_rate, betas=(0.9, 0.98), fused=True),
        )
        self.rates = (matrix_rate, vector_rate)

    def step(self, loss: Tensor, factor: float) -> None:
        """One step down the loss at ``factor`` times the learning rates."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
        for weight in self.parameters:
            weight.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for weight, view in self.views:
            view.grad = None if weight.grad is None else weight.grad.reshape(view.shape)
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimizers, for resuming."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """What :meth:`state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@contextmanager
def half_precision() -> Iterator[None]:
    """bfloat16 matrices and convolutions, float32 attention: its bfloat16 gradient is three times slower on a CPU."""
    attention = nn.functional.scaled_dot_product_attention

    def in_float32(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = attention(query.float(), key.float(), value.float(), *args, **kwargs)
        return wide.to(query.dtype)

    with patch.object(nn.functional, "scaled_dot_product_attention", in_float32), torch.autocast("cpu", torch.bfloat16):
        yield


VAE_BATCH = {"person": 6, "agnostic": 1, "densepose": 1}


def train_vae(model: TryOnModel, data: dict[str, Tensor], options: argparse.Namespace) -> None:
    """L1, squared error, an edge term and a weak KL, on whole pictures, whose statistics the norms have to see."""
    finished = options.work / "vae.pt"
    if finished.exists():
        model.vae.load_state_dict(torch.load(finished, weights_only=True))
        return
    vae = model.vae.train()
    optimizers = Optimizers(vae, 1e-2, 4e-3)
    draw = torch.Generator().manual_seed(1)
    progress = tqdm(range(options.vae_steps), desc="VAE", mininterval=10)
    for step in progress:
        rows = {name: torch.randint(len(data[name]), (share,), generator=draw) for name, share in VAE_BATCH.items()}
        images = torch.cat([pictures(data[name][chosen]) for name, chosen in rows.items()])
        with half_precision():
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(draw)).sample
        error = decoded.float() - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = 2e-7 * posterior.kl().mean()
        loss = error.abs().mean() + error.square().mean() + edges + divergence
        optimizers.step(loss, trapezoid(step, options.vae_steps))
        if step % 25 == 0:
            ratio = -10 * error[: VAE_BATCH["person"]].square().mean().div(4).log10().item()
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{ratio:.1f}")
    vae.eval()
    save_state(finished, vae.state_dict())


@torch.no_grad()
def set_scaling_factor(model: TryOnModel, data: dict[str, Tensor]) -> None:
    """Scales latents to unit standard deviation, as Stable Diffusion's 0.18215 does for its VAE."""
    latents = model.vae.encode(pictures(data["person"][:128])).latent_dist.mean
    model.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode_all(model: TryOnModel, data: dict[str, Tensor], work: Path) -> dict[str, Tensor]:
    """Latents of the three pictures that the denoiser sees, float32 [count, 4, height, width], instead of them."""
    names = ("person", "agnostic", "densepose")
    file = work / f"latents-{len(data['garment'])}.safetensors"
    if not file.exists():
        encoded = {}
        for name in names:
            chunks = tqdm(data[name].split(64), desc=f"encoding {name}", mininterval=5)
            with half_precision():
                latents = [model.encode_latents(pictures(chunk)).half() for chunk in chunks]
            encoded[name] = torch.cat(latents).contiguous()
        save_file(encoded, file)
    others = {name: value for name, value in data.items() if name not in names}
    return others | {name: value.float() for name, value in load_file(file).items()}


def seed_weight(step: int, seeded_steps: int) -> float:
    """1 for the first half of the seeded steps, then linearly down to 0."""
    return min(1.0, max(0.0, 2 - 2 * step / max(seeded_steps, 1)))


def train_denoiser(model: TryOnModel, data: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Denoising loss, with the fading hint on the seeded layers; the exponential average of the weights is kept."""
    torch.manual_seed(2)
    trained = nn.ModuleList([model.unet, model.reference_encoder, model.projector])
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizers = Optimizers(trained, options.learning_rate, options.vector_learning_rate)
    parts = {"trained": trained, "average": average, "optimizers": optimizers}
    state_file, first = options.work / "denoiser.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model.vae.requires_grad_(False)
    log = options.work / "log.jsonl"
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, desc="denoiser", mininterval=10)
    with ScoreTap(model, model.attention_recipe(), list(SEEDED_LAYERS)) as tap:
        for step in progress:
            hint = seed_weight(step, options.seeded_steps)
            denoising, seeding = denoiser_losses(model, data, tap, step, hint, options.batch)
            factor = trapezoid(step, options.steps, warmup=100)
            optimizers.step(denoising + 0.03 * hint * seeding, factor)
            average.update_parameters(trained)
            if step % 20 == 0:
                row = {"loss": round(denoising.item(), 4), "seeding": round(float(seeding), 3)}
                progress.set_postfix(row)
                with log.open("a") as lines:
                    lines.write(json.dumps({"step": step} | row) + "\n")
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                states = {name: part.state_dict() for name, part in parts.items()}
                save_state(state_file, states | {"step": step + 1})
                current = {name: value.clone() for name, value in trained.state_dict().items()}
                trained.load_state_dict(average.module.state_dict())
                model.save_pretrained(options.output, half=True)
                trained.load_state_dict(current)


def denoiser_losses(
    model: TryOnModel, data: dict[str, Tensor], tap: ScoreTap, step: int, hint: float, batch: int
) -> tuple[Tensor, Tensor]:
    """Denoising loss and the hint's cross-entropy (0 once it has faded) of the step's own random batch."""
    draw = torch.Generator().manual_seed(1000 + step)  # resuming continues the same stream
    rows = torch.randint(len(data["garment"]), (batch,), generator=draw)
    clean, schedule = data["person"][rows], model.schedule
    noise = torch.randn(clean.shape, generator=draw)
    # More high noise than uniform: that is where the garment has to be looked up.
    uniform = torch.rand(batch, generator=draw)
    timesteps = ((1 - uniform**1.4) * schedule.length).long().clamp_max(schedule.length - 1)
    dropped = torch.rand(batch, generator=draw) < 0.1
    with half_precision():
        encoded = model.encode_reference(pictures(data["garment"][rows]))
        tokens = model.projector.drop(encoded, dropped)
        prediction = model.denoise(
            schedule.noised(clean, noise, timesteps),
            timesteps,
            Conditions(data["agnostic"][rows], data["densepose"][rows], tokens),
        )
    target = schedule.target(clean, noise, timesteps)
    denoising = (prediction.float() - target).square().mean()
    seeding = torch.zeros(())
    if hint > 0:
        for layer in SEEDED_LAYERS:
            true = data[f"target_{layer}"][rows][~dropped]
            scores = tap.scores(layer)[~dropped]
            everywhere = torch.ones(scores.shape[:2], dtype=torch.bool)
            generated, reference = tap.generated_grid(layer), tap.reference_grid(layer)
            attention = attention_on_grids(scores, everywhere, generated, reference, target=true)
            seeding = seeding + supervised(attention).mean()
    return denoising, seeding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_model"), help="state for resuming")
    parser.add_argument("--output", type=Path, default=Path("data/weights/tiny"), help="the model's folder")
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--vae-steps", type=int, default=2200)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--seeded-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of matrices (Muon)")
    parser.add_argument("--vector-learning-rate", type=float, default=2e-3, help="of the rest")
    parser.add_argument("--save-every", type=int, default=250)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(0)
    model = build_model(SIZE)
    data = render_all(options.samples, options.work)
    train_vae(model, data, options)
    set_scaling_factor(model, data)
    print(f"VAE ready after {(time.monotonic() - started) / 60:.1f} min; scale {model.vae.config.scaling_factor}")
    train_denoiser(model, encode_all(model, data, options.work), options)
    print(f"finished after {(time.monotonic() - started) / 60:.1f} min: {options.output}")


if __name__ == "__main__":
    main()
