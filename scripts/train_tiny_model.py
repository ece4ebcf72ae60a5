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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from i2am_train.attribution.tap import ScoreTap
from i2am_train.datasets.synthetic import render_sample
from i2am_train.losses.supervised import correspondence_cross_entropy
from i2am_train.metrics.correspondence import target_on_grid
from i2am_train.models.build import build_model
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
    pictures = {
        name: getattr(sample, name) for name in ("person", "agnostic", "densepose", "garment")
    }
    targets = {
        f"target_{layer}": target_on_grid(truth, mask, grid, reference)[0].numpy()
        for layer, grid in SEEDED_LAYERS.items()
    }
    return pictures | targets


def render_all(count: int, work: Path) -> dict[str, Tensor]:
    """``count`` samples, stacked; pictures are uint8 [count, height, width, 3]."""
    file = work / "data.safetensors"
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


def crops_of(batch: Tensor, size: GridSize, draw: torch.Generator) -> Tensor:
    """The same random window of every picture."""
    top = int(torch.randint(batch.shape[1] - size.height + 1, (), generator=draw))
    left = int(torch.randint(batch.shape[2] - size.width + 1, (), generator=draw))
    return batch[:, top : top + size.height, left : left + size.width]


def train_vae(model: TryOnModel, data: dict[str, Tensor], options: argparse.Namespace) -> None:
    """First on many small crops, then on whole pictures, whose statistics the group normalisation has to see."""
    half = GridSize(SIZE.height // 2, SIZE.width // 2)
    crops = {"person": 10, "agnostic": 3, "densepose": 3}
    whole = {"person": 6, "agnostic": 1, "densepose": 1}
    vae_phase(
        model,
        data,
        options.work / "vae_crops.pt",
        options.vae_crop_steps,
        half,
        crops,
        (2e-3, 2e-6),
    )
    vae_phase(model, data, options.work / "vae.pt", options.vae_steps, SIZE, whole, (1e-3, 2e-7))
    set_scaling_factor(model, data)


def vae_phase(
    model: TryOnModel,
    data: dict[str, Tensor],
    finished: Path,
    steps: int,
    size: GridSize,
    shares: dict[str, int],
    rates: tuple[float, float],
) -> None:
    """L1, squared error, an edge term and a weak KL.

    ``shares`` says how many pictures of each kind make a batch; ``rates`` are learning rate and weight of the KL.
    """
    learning_rate, divergence = rates
    if finished.exists():
        model.vae.load_state_dict(torch.load(finished, weights_only=True))
        return
    vae = model.vae.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    draw = torch.Generator().manual_seed(1)
    progress = tqdm(range(steps), desc=f"VAE at {size}", mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * trapezoid(step, steps)
        parts = []
        for name, share in shares.items():
            rows = torch.randint(len(data[name]), (share,), generator=draw)
            parts.append(pictures(crops_of(data[name][rows], size, draw)))
        images = torch.cat(parts)
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample(draw)).sample - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = (
            error.abs().mean() + error.square().mean() + edges + divergence * posterior.kl().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            ratio = -10 * error[: shares["person"]].square().mean().div(4).log10().item()
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{ratio:.1f}")
    vae.eval()
    torch.save(vae.state_dict(), finished)


@torch.no_grad()
def set_scaling_factor(model: TryOnModel, data: dict[str, Tensor]) -> None:
    """Scales latents to unit standard deviation, as Stable Diffusion's 0.18215 does for its VAE."""
    latents = model.vae.encode(pictures(data["person"][:128])).latent_dist.mean
    model.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode_all(model: TryOnModel, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents of the three pictures that the denoiser sees, float32 [count, 4, height, width]."""
    encoded = {}
    for name in ("person", "agnostic", "densepose"):
        chunks = tqdm(data.pop(name).split(64), desc=f"encoding {name}", mininterval=5)
        encoded[name] = torch.cat([model.encode_latents(pictures(chunk)) for chunk in chunks])
    return data | encoded


def seed_weight(step: int, seeded_steps: int) -> float:
    """1 for the first half of the seeded steps, then linearly down to 0."""
    return min(1.0, max(0.0, 2 - 2 * step / max(seeded_steps, 1)))


def train_denoiser(model: TryOnModel, data: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Denoising loss, with the fading hint on the seeded layers; the exponential average of the weights is kept."""
    torch.manual_seed(2)
    trained = torch.nn.ModuleList([model.unet, model.reference_encoder, model.projector])
    parameters = list(trained.parameters())
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    state_file, first = options.work / "denoiser.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trained.load_state_dict(state["trained"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.vae.requires_grad_(False)
    count, schedule, log = len(data["garment"]), model.schedule, options.work / "log.jsonl"
    progress = tqdm(
        range(first, options.stop_at),
        initial=first,
        total=options.stop_at,
        desc="denoiser",
        mininterval=10,
    )
    with ScoreTap(model, model.attention_recipe(), list(SEEDED_LAYERS)) as tap:
        for step in progress:
            draw = torch.Generator().manual_seed(1000 + step)  # resuming continues the same stream
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * trapezoid(step, options.steps, warmup=100)
            rows = torch.randint(count, (options.batch,), generator=draw)
            clean = data["person"][rows]
            noise = torch.randn(clean.shape, generator=draw)
            # More high noise than uniform: that is where the garment has to be looked up.
            uniform = torch.rand(options.batch, generator=draw)
            timesteps = ((1 - uniform**1.4) * schedule.length).long().clamp_max(schedule.length - 1)
            dropped = torch.rand(options.batch, generator=draw) < 0.1
            tokens = model.projector.drop(
                model.encode_reference(pictures(data["garment"][rows])), dropped
            )
            prediction = model.denoise(
                schedule.noised(clean, noise, timesteps),
                timesteps,
                Conditions(data["agnostic"][rows], data["densepose"][rows], tokens),
            )
            denoising = (prediction - schedule.target(clean, noise, timesteps)).square().mean()
            loss, hint = denoising, seed_weight(step, options.seeded_steps)
            if hint > 0:
                kept = ~dropped
                for layer in SEEDED_LAYERS:
                    targets = data[f"target_{layer}"][rows][kept]
                    scores = tap.scores(layer)[kept]
                    loss = (
                        loss
                        + 0.03
                        * hint
                        * correspondence_cross_entropy(scores, targets, model.reference_grid).mean()
                    )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update_parameters(trained)
            if step % 20 == 0:
                progress.set_postfix(
                    loss=f"{denoising.item():.4f}", seeded=f"{loss.item() - denoising.item():.4f}"
                )
                with log.open("a") as lines:
                    lines.write(json.dumps({"step": step, "loss": denoising.item()}) + "\n")
            if (step + 1) % options.save_every == 0 or step + 1 == options.stop_at:
                save_state(
                    state_file,
                    {
                        "trained": trained.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                    },
                )
                current = {name: value.clone() for name, value in trained.state_dict().items()}
                trained.load_state_dict(average.module.state_dict())
                model.save_pretrained(options.output, half=True)
                trained.load_state_dict(current)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny_model"), help="state for resuming"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/weights/tiny"), help="the model's folder"
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--vae-crop-steps", type=int, default=1300)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seeded-steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--stop-at", type=int, default=2000, help="end here, on the schedule of --steps"
    )
    parser.add_argument("--save-every", type=int, default=250)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(0)
    model = build_model(SIZE)
    data = render_all(options.samples, options.work)
    train_vae(model, data, options)
    print(
        f"VAE ready after {(time.monotonic() - started) / 60:.1f} min; scale {model.vae.config.scaling_factor}"
    )
    train_denoiser(model, encode_all(model, data), options)
    print(f"finished after {(time.monotonic() - started) / 60:.1f} min: {options.output}")


if __name__ == "__main__":
    main()
