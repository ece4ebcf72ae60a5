"""The recipe of the shipped tiny model: draws its data, trains the VAE, then the denoiser.

    python scripts/train_tiny_model.py --work runs/tiny_model --output data/weights/tiny
    python scripts/train_tiny_model.py --start data/weights/tiny --steps 9000 --learning-rate 2.5e-3

Stopped and started again with the same words it goes on where it was, on the same device or the other: the random
numbers of a step are those of its number, drawn on the CPU. Weights are equal to the bit on a CPU; on a GPU some sums
have no fixed order. Samples are drawn by all cores. On a GPU each step is captured once and replayed; on two cores the
same recipe is only slower. The output is written at every save (averaged weights, float16) and replaces a model there.

The denoiser is trained on the denoising loss; for the first --seeded-steps steps layers 2 and 5 also see the true
correspondence (cross-entropy to a Gaussian), because a model this small finds the garment several times sooner with
that hint. The hint then fades and is gone for the rest of the run, in which these layers drift wherever the denoising
loss lets them: the paper's starting point. Quality figures of the result come from 'i2am evaluate'.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from training_steps import CapturedStep, Optimizers, half_precision, own_stream, take_steps

from i2am_train.attention.trace import ScoreTap
from i2am_train.data.synthetic.rendering import render_sample
from i2am_train.environment import ignore_interrupts, machine
from i2am_train.errors import ConfigError, I2AMError
from i2am_train.files import free_space, written
from i2am_train.locks import locked
from i2am_train.losses.attention import attention_on_grids
from i2am_train.losses.literature import supervised
from i2am_train.metrics.attention import target_on_grid
from i2am_train.models.architecture import build_model
from i2am_train.models.pretrained import INDEX_FILE
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.ops.numerics import chosen_device
from i2am_train.types import GridSize

SEEDED_LAYERS = {2: 16, 5: 8}  # paper number: pixels of a cell of its grid
DATA_SEED = 20_000  # not a seed of 'i2am data make': the shipped model has seen none of its images
CHUNK = 250  # samples in a file of drawn data, which a stopped run need not draw again
PICTURES = ("person", "agnostic", "densepose", "garment")
ENCODED = PICTURES[:3]  # what the denoiser sees as latents
VAE_BATCH = {"person": 6, "agnostic": 1, "densepose": 1}
HINT = 0.03  # weight of the hint in the loss
AVERAGE = 0.998  # decay of the averaged weights


# ---- data -------------------------------------------------------------------------------------------------------


def render(index: int, size: GridSize) -> dict[str, np.ndarray]:
    """One training sample: four pictures, and the true reference position of each cell of the seeded layers."""
    sample = render_sample(DATA_SEED, index, size)
    truth = torch.from_numpy(sample.correspondence)[None]
    mask = torch.from_numpy(sample.warped_garment_mask)[None]
    reference = GridSize(size.height // 8, size.width // 8)
    targets = {
        f"target_{layer}": target_on_grid(
            truth, mask, GridSize(size.height // pixels, size.width // pixels), reference
        )[0].numpy()
        for layer, pixels in SEEDED_LAYERS.items()
    }
    return {name: getattr(sample, name) for name in PICTURES} | targets


def render_chunk(size: GridSize, first: int, end: int, file: Path) -> int:
    """Writes the samples from ``first`` to before ``end``; gives their number."""
    rows = [render(index, size) for index in range(first, end)]
    with written(file) as unfinished:
        save_file({name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}, unfinished)
    return end - first


def begin_worker() -> None:
    torch.set_num_threads(1)
    ignore_interrupts()


def render_all(count: int, size: GridSize, work: Path) -> dict[str, Tensor]:
    """``count`` samples, stacked; pictures are uint8 [count, height, width, 3]. Drawn by all cores, kept in chunks."""
    whole = work / f"data-{count}.safetensors"  # of earlier versions of this script
    if whole.exists():
        data = load_file(whole)
        if (found := tuple(data["person"].shape[1:3])) != size:
            raise ConfigError(f"'{whole}' has pictures of {GridSize(*found)}, --size is {size}. Give another --work.")
        return data
    chunks = [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    files = {work / f"data-{size}" / f"{first:06d}-{end:06d}.safetensors": (first, end) for first, end in chunks}
    missing = {file: span for file, span in files.items() if not file.exists()}
    to_draw = sum(end - first for first, end in missing.values())
    needed, (place, free) = to_draw * size.tokens * 3 * len(PICTURES), free_space(work)
    if free < needed:
        raise ConfigError(
            f"{to_draw} samples need {needed / 2**30:.1f} GiB in '{place}', and {free / 2**30:.1f} GiB are free there. "
            "Make room, give a --work on another disk, or fewer --samples."
        )
    workers = min(machine()["cores"], len(missing))
    with tqdm(desc="drawing samples", unit="sample", initial=count - to_draw, total=count, mininterval=5) as bar:
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # a fork of a process that runs threads may hang
            with ProcessPoolExecutor(workers, context, initializer=begin_worker) as pool:
                for drawn in pool.map(partial(render_chunk, size), *zip(*missing.values(), strict=True), missing):
                    bar.update(drawn)
        else:
            for file, span in missing.items():
                bar.update(render_chunk(size, *span, file))
    loaded = [load_file(file) for file in files]
    return {name: torch.cat([chunk[name] for chunk in loaded]) for name in loaded[0]}


def pictures(batch: Tensor) -> Tensor:
    """uint8 [batch, height, width, 3] as float [batch, 3, height, width] in [-1, 1], channels last in memory."""
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- steps ------------------------------------------------------------------------------------------------------


def trapezoid(step: int, steps: int, warmup: int = 50, decay: float = 0.35) -> float:
    """Learning-rate factor: linear up, flat, linear down to 2 % over the last ``decay`` of the run."""
    down = (steps - step) / (decay * steps)
    return min((step + 1) / warmup, 1.0, max(down, 0.02))


def train_vae(model: TryOnModel, data: dict[str, Tensor], options: argparse.Namespace) -> None:
    """L1, squared error, an edge term and a weak KL, on whole pictures, whose statistics the norms have to see."""
    finished = options.work / "vae.pt"
    if finished.exists():
        model.vae.load_state_dict(torch.load(finished, weights_only=True, map_location="cpu"))
        return
    vae, device, size = model.vae.train(), model.device, model.latent_size
    optimizers = Optimizers(vae, 1e-2, 4e-3)

    def step(rows: Tensor, noise: Tensor, factor: Tensor) -> dict[str, Tensor]:
        chosen = rows.split(list(VAE_BATCH.values()))
        images = torch.cat([pictures(data[name][part]) for name, part in zip(VAE_BATCH, chosen, strict=True)])
        with half_precision(device):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = 2e-7 * posterior.kl().mean()
        loss = error.abs().mean() + error.square().mean() + edges + divergence
        optimizers.step(loss, factor)
        psnr = -10 * error[: VAE_BATCH["person"]].square().mean().div(4).log10()
        return {"loss": loss.detach(), "psnr": psnr.detach()}

    captured = CapturedStep(step, device)

    def advance(number: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(10**6 + number)
        batch = sum(VAE_BATCH.values())
        return captured(
            rows=torch.randint(len(data["person"]), (batch,), generator=draw),
            noise=torch.randn(batch, 4, *size, generator=draw),
            factor=torch.tensor(trapezoid(number, options.vae_steps)),
        )

    parts = {"vae": vae, "optimizers": optimizers}
    state, log = options.work / "vae_training.pt", options.work / "vae_log.jsonl"
    take_steps(options.vae_steps, advance, parts, state, log, options.save_every)
    with written(finished) as unfinished:
        torch.save(vae.state_dict(), unfinished)


@torch.no_grad()
def set_scaling_factor(model: TryOnModel, persons: Tensor) -> None:
    """Scales latents to unit standard deviation, as Stable Diffusion's 0.18215 does for its VAE."""
    latents = model.vae.encode(pictures(persons[:128].to(model.device))).latent_dist.mean
    model.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode_all(model: TryOnModel, data: dict[str, Tensor], work: Path) -> dict[str, Tensor]:
    """Latents of the three pictures that the denoiser sees, float16 [count, 4, height, width], instead of them."""
    file = work / f"latents-{len(data['garment'])}.safetensors"

    def encode(images: Tensor) -> Tensor:
        with half_precision(model.device):
            return model.encode_latents(pictures(images.to(model.device))).half().cpu()

    if not file.exists():
        encoded = {
            name: torch.cat([encode(part) for part in tqdm(data[name].split(64), f"encoding {name}", mininterval=5)])
            for name in ENCODED
        }
        with written(file) as unfinished:
            save_file({name: latents.contiguous() for name, latents in encoded.items()}, unfinished)
    latents = load_file(file)
    again, kept = encode(data["person"][:2]).float(), latents["person"][:2].float()
    if again.shape != kept.shape or (again - kept).abs().mean() > 0.1:  # the latents' standard deviation is 1
        raise ConfigError(
            f"The latents in '{file}' are not those of this model's VAE: the run in this --work was begun from another "
            "--start, or without one. Give the words that it was begun with, or another --work."
        )
    return {name: value for name, value in data.items() if name not in ENCODED} | latents


def seed_weight(step: int, seeded_steps: int) -> float:
    """1 for the first half of the seeded steps, then linearly down to 0."""
    return min(1.0, 2 - 2 * step / seeded_steps) if step < seeded_steps else 0.0


def train_denoiser(model: TryOnModel, data: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Denoising loss, with the fading hint on the seeded layers; the exponential average of the weights is kept."""
    model.vae.requires_grad_(False)
    trained = nn.ModuleList([model.unet, model.reference_encoder, model.projector])
    average = torch.optim.swa_utils.AveragedModel(trained)
    optimizers = Optimizers(trained, options.learning_rate, options.vector_learning_rate)
    averages, weights = ([weight.detach() for weight in part.parameters()] for part in (average.module, trained))

    def step(hinted: bool, weight: Tensor, factor: Tensor, **drawn: Tensor) -> dict[str, Tensor]:
        denoising, seeding = denoiser_losses(model, data, tap, hinted=hinted, **drawn)
        optimizers.step(denoising + weight * seeding, factor)
        torch._foreach_lerp_(averages, weights, 1 - AVERAGE)
        return {"loss": denoising.detach(), "seeding": seeding.detach()}

    captured = {hinted: CapturedStep(partial(step, hinted), model.device) for hinted in (True, False)}

    def advance(number: int) -> dict[str, Tensor]:
        hint = seed_weight(number, options.seeded_steps)
        results = captured[hint > 0](
            weight=torch.tensor(HINT * hint),
            factor=torch.tensor(trapezoid(number, options.steps, warmup=100)),
            **denoiser_draws(number, options.batch, data["person"], model.schedule.length),
        )
        if number == 0:
            average.update_parameters(trained)  # its first is a copy: the average does not know the random start
        return results

    def save_model() -> None:
        current = {name: value.clone() for name, value in trained.state_dict().items()}
        trained.load_state_dict(average.module.state_dict())
        model.save_pretrained(options.output, half=True)
        trained.load_state_dict(current)

    parts = {"trained": trained, "average": average, "optimizers": optimizers}
    with ScoreTap(model, model.attention_recipe(), list(SEEDED_LAYERS)) as tap:
        state, log = options.work / "denoiser.pt", options.work / "log.jsonl"
        take_steps(options.steps, advance, parts, state, log, options.save_every, save_model)


def denoiser_draws(step: int, batch: int, latents: Tensor, timesteps: int) -> dict[str, Tensor]:
    """The random numbers of a step, on the CPU: resuming continues the same stream, on whichever device."""
    draw = torch.Generator().manual_seed(1000 + step)
    rows = torch.randint(len(latents), (batch,), generator=draw)
    noise = torch.randn(batch, *latents.shape[1:], generator=draw)
    # More high noise than uniform: that is where the garment has to be looked up.
    uniform = torch.rand(batch, generator=draw)
    chosen = ((1 - uniform**1.4) * timesteps).long().clamp_max(timesteps - 1)
    dropped = torch.rand(batch, generator=draw) < 0.1
    return {"rows": rows, "noise": noise, "timesteps": chosen, "dropped": dropped}


def denoiser_losses(
    model: TryOnModel,
    data: dict[str, Tensor],
    tap: ScoreTap,
    *,
    rows: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    dropped: Tensor,
    hinted: bool,
) -> tuple[Tensor, Tensor]:
    """Denoising loss and the hint's cross-entropy, mean over samples with their condition (0 without the hint)."""
    clean, agnostic, pose = (data[name][rows].float() for name in ENCODED)
    noisy = model.schedule.noised(clean, noise, timesteps)
    with half_precision(model.device):
        tokens = model.projector.drop(model.encode_reference(pictures(data["garment"][rows])), dropped)
        prediction = model.denoise(noisy, timesteps, Conditions(agnostic, pose, tokens))
    target = model.schedule.target(clean, noise, timesteps)
    denoising = (prediction.float() - target).square().mean()
    seeding = torch.zeros((), device=clean.device)
    for layer in SEEDED_LAYERS if hinted else ():
        scores, grids = tap.scores(layer), (tap.generated_grid(layer), tap.reference_grid(layer))
        everywhere = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
        true = data[f"target_{layer}"][rows]
        attention = attention_on_grids(scores, everywhere, *grids, target=true, conditioned=~dropped)
        seeding = seeding + supervised(attention).sum() / (~dropped).sum().clamp(min=1)
    return denoising, seeding


# ---- the command ------------------------------------------------------------------------------------------------


def grid_size(text: str) -> GridSize:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)) or (int(height) | int(width)) % 16:
        raise argparse.ArgumentTypeError(f"'{text}' is no size like 128x96, height and width multiples of 16")
    return GridSize(int(height), int(width))


def whole_number(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least}")
    return int(text)


def rate(text: str) -> float:
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text above as it is, and the defaults."""


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tiny_model"), help="state for resuming: data, latents, weights, logs")
    add("--output", type=Path, default=Path("data/weights/tiny"), help="the model's folder")
    add("--start", type=Path, metavar="MODEL", help="go on from this model, with its VAE and without the hint")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add("--size", type=grid_size, default=GridSize(128, 96), help="of the pictures, HEIGHTxWIDTH")
    add("--samples", type=whole_number, default=8000, help="to draw; 1,000 of 128x96 take 150 MB")
    add("--vae-steps", type=whole_number, default=2200, help="of 8 pictures")
    add("--steps", type=whole_number, default=3600, help="of the denoiser; the rates fall over the last 35 %% of them")
    add(
        "--seeded-steps",
        type=partial(whole_number, least=0),
        default=600,
        help="with the hint, which fades over their second half",
    )
    add("--batch", type=whole_number, default=16, help="samples of a denoiser's step")
    add("--learning-rate", type=rate, default=4e-3, help="of the denoiser's matrices (Muon)")
    add("--vector-learning-rate", type=rate, default=2e-3, help="of its other weights (AdamW)")
    add(
        "--save-every",
        type=whole_number,
        default=250,
        help="steps between saved states; the output is written then, too",
    )
    return parser.parse_args(words)


def starting_model(options: argparse.Namespace) -> TryOnModel:
    """The model to train, on the CPU: that of --start, or a new one."""
    output = options.output
    if output.exists() and not (output / INDEX_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"'{output}' exists and is no model. Give the folder of a model or a new one as --output.")
    if options.start is None:
        torch.manual_seed(0)
        return build_model(options.size)
    model = TryOnModel.from_pretrained(options.start)
    if model.image_size != options.size:
        raise ConfigError(
            f"The model in '{options.start}' is for pictures of {model.image_size}, and --size is {options.size}. "
            f"Give --size {model.image_size}."
        )
    return model


def run(options: argparse.Namespace) -> None:
    """Data, VAE, latents and denoiser, each as far as it is not there."""
    device, started = chosen_device(options.device), time.monotonic()
    model = starting_model(options)
    data = render_all(options.samples, options.size, options.work)
    with own_stream(device):
        model.to(device)
        if options.start is None:
            train_vae(model, {name: data[name].to(device) for name in VAE_BATCH}, options)
            set_scaling_factor(model, data["person"])
        else:
            options.seeded_steps = 0
        print(f"VAE ready after {(time.monotonic() - started) / 60:.1f} min; scale {model.vae.config.scaling_factor}")
        model.vae.eval()
        encoded = encode_all(model, data, options.work)
        train_denoiser(model, {name: value.to(device) for name, value in encoded.items()}, options)
    print(f"finished after {(time.monotonic() - started) / 60:.1f} min: {options.output}")


def main() -> None:
    options = parsed(sys.argv[1:])
    try:
        with locked(options.work):
            run(options)
    except I2AMError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.status)


if __name__ == "__main__":
    main()
