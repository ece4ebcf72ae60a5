"""What attention capture costs: time and memory of sampling and of the refined training step.

Four cases, each with the median of paired time ratios and the extra peak memory:

- ``sd15_257_tokens``, ``sd15_1037_tokens``: a U-Net of Stable Diffusion 1.5's size (random weights,
  12 input channels), one denoiser evaluation at 512x384 (latent 64x48) without guidance. That is
  the hard case: guidance doubles the network's work and not the capture's.
- ``tiny``: ``i2am_train.models.sampling.sample`` with the tiny model, whole call, with guidance.
- ``train_step``: forward, losses, backward and optimizer step of the tiny model, refined against
  baseline.

Plain and captured runs alternate in one process, so that a busy machine slows both; the ratio of
processor seconds is given beside that of wall seconds, as it hardly notices other processes. Memory
is measured in fresh processes, one per variant, as the peak of the resident set above that of the
plain variant. ``softmax`` is the named rival: the same hooks, with the two softmaxes of each layer
as one writes them first. ``captured sdpa`` is the second backend; its numbers are in the JSON.

``--kernels`` measures the column means alone instead, for layers of SD1.5 and a square one: the
Triton kernels, torch's operations on blocks, and the two softmaxes, in bfloat16 on a CUDA device and
in float32 on a CPU, which has no kernel. One line of JSON for each shape, as soon as it is known.

    python scripts/benchmark_capture.py --runs 7
    python scripts/benchmark_capture.py --kernels
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from process_memory import printed_by, resident
from torch import Tensor

from i2am_train.attention import diffusers_decoder, trace
from i2am_train.ops.attention import ColumnMeans
from i2am_train.reporting.table import markdown_lines
from i2am_train.types import GridSize

GIVE_BACK_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc otherwise keeps what it once got, and the peak depends on how the heap happens to break up."""

Variant = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Ways to do the same work; the first is plain, the second is measured, others are rivals."""

    variants: dict[str, Variant]
    plain: str
    measured: str


@torch.no_grad()
def two_softmaxes(generated: Tensor, reference: Tensor, scale: float | None = None, **_: Any) -> ColumnMeans:
    """The rival: all heads' logits at once, two softmaxes, two means."""
    logits = generated.float() @ reference.float().mT * (scale or generated.shape[-1] ** -0.5)
    return ColumnMeans(logits.softmax(dim=-2).mean(dim=-1), logits.softmax(dim=-1).mean(dim=-2))


@contextmanager
def traced_with_softmaxes(target: object, recipe: Any = None) -> Iterator[None]:
    """`trace` with the rival's reduction."""
    with patch("i2am_train.attention.recorder.column_means", two_softmaxes), trace(target, recipe):
        yield


def sd15_unet() -> Any:
    """SD1.5's U-Net with 12 input channels; weights are random and quickly made."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=(64, 48),
            in_channels=12,
            cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
        )
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    noise = torch.randn(2**20) * 0.02
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))  # norms are the identity, biases zero
        else:
            repeats = -(-parameter.numel() // noise.numel())
            parameter.copy_(noise.repeat(repeats)[: parameter.numel()].view_as(parameter))
    return unet


def sd15_case(grid: GridSize) -> Case:
    """One evaluation of the SD1.5-sized network with the patches of a grid and a class token."""
    unet = sd15_unet()
    recipe = diffusers_decoder(grid, special_tokens=1, rows="all", root="")
    latents = torch.randn(1, 12, 64, 48)
    tokens = torch.randn(1, grid.tokens + 1, 768)

    def evaluate(context: Callable[[], AbstractContextManager[object]]) -> Variant:
        def run() -> None:
            with torch.no_grad(), context():
                unet(latents, torch.tensor(500), tokens)

        return run

    return Case(
        {
            "plain": evaluate(nullcontext),
            "captured": evaluate(lambda: trace(unet, recipe)),
            "captured sdpa": evaluate(lambda: trace(unet, recipe, via="sdpa")),
            "plain softmax": evaluate(lambda: traced_with_softmaxes(unet, recipe)),
        },
        "plain",
        "captured",
    )


def tiny_model() -> Any:
    """The project's tiny try-on model with random weights."""
    from i2am_train.models.architecture import build_model

    torch.manual_seed(0)
    return build_model(GridSize(128, 96)).eval()


def tiny_case(batch: int = 4, steps: int = 4) -> Case:
    """Whole calls of the sampler."""
    from i2am_train.models.sampling import sample

    model = tiny_model()
    images = torch.rand(3, batch, 3, 128, 96) * 2 - 1

    def draw(context: Callable[[], AbstractContextManager[object]]) -> Variant:
        def run() -> None:
            with context():
                sample(model, *images, seeds=range(batch), steps=steps)

        return run

    return Case(
        {
            "plain": draw(nullcontext),
            "captured": draw(lambda: trace(model)),
            "captured sdpa": draw(lambda: trace(model, via="sdpa")),
            "plain softmax": draw(lambda: traced_with_softmaxes(model)),
        },
        "plain",
        "captured",
    )


def train_case(batch: int = 8) -> Case:
    """Training steps of two copies of the tiny model."""
    from i2am_train.attention import ScoreTap
    from i2am_train.config.objective import ObjectiveConfig
    from i2am_train.losses.objective import Objective, make_objective
    from i2am_train.training.step import draw, step_losses

    samples = synthetic_batch(batch)
    terms = {name: {"weight": 1e-3} for name in ("dcml", "tv", "cwg")}
    refined = make_objective(ObjectiveConfig(layers=2, terms=terms))

    def trainer(objective: Objective) -> Variant:
        model = tiny_model().train()
        model.vae.requires_grad_(False)
        model.reference_encoder.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        tap = ScoreTap(model, layers=list(objective.layers)) if objective.terms else None
        if tap is not None:
            tap.attach()
        draws = draw(
            0, 0, list(range(batch)), latent=model.latent_size,
            timesteps=model.schedule.length, condition_dropout=0.2,
        )  # fmt: skip

        def run() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(step_losses(model, samples, draws, objective, tap)["total"])
            optimizer.step()

        return run

    return Case({"baseline": trainer(Objective()), "refined": trainer(refined)}, "baseline", "refined")


def synthetic_batch(batch: int) -> Any:
    """Noise in the shape of a training batch; garments cover the middle of the person."""
    picture = torch.rand(4, batch, 3, 128, 96) * 2 - 1
    mask = torch.zeros(batch, 128, 96, dtype=torch.bool)
    mask[:, 32:96, 24:72] = True
    names = ("person", "garment", "agnostic", "densepose")
    return dict(zip(names, picture, strict=True)) | {"warped_garment_mask": mask}


CASES: dict[str, Callable[[], Case]] = {
    "sd15_257_tokens": lambda: sd15_case(GridSize(16, 16)),
    "sd15_1037_tokens": lambda: sd15_case(GridSize(37, 28)),
    "tiny": tiny_case,
    "train_step": train_case,
}


KERNEL_SHAPES = {
    # heads, generated tokens, reference tokens, channels of a head
    "192x1036": (8, 192, 1036, 160),
    "768x1036": (8, 768, 1036, 80),
    "3072x1036": (8, 3072, 1036, 40),
    "4096x4096": (8, 4096, 4096, 64),
}


def measure_kernels(name: str, runs: int, batch: int = 1) -> dict[str, Any]:
    """Milliseconds and peak memory of each way to the two column means of one layer; medians."""
    from i2am_train.ops import attention, column_blocks

    on_card = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_card else ("cpu", torch.float32)
    heads, rows, columns, channels = KERNEL_SHAPES[name]
    generated, reference = (
        torch.randn(batch, tokens, heads, channels, device=device, dtype=dtype).transpose(1, 2)
        for tokens in (rows, columns)
    )
    scale, budget = channels**-0.5, attention.DEFAULT_BYTE_BUDGET
    ways: dict[str, Variant] = {
        "blocks": lambda: column_blocks.column_means(generated, reference, scale, None, budget),
        "softmax": lambda: two_softmaxes(generated, reference, scale),
    }
    if on_card and (kernels := attention._kernels_for(generated, reference)) is not None:
        ways["kernel"] = lambda: kernels.column_means(generated, reference, scale, None)
    wall, _ = time_case(Case(ways, "softmax", "blocks"), runs)
    result: dict[str, Any] = {"case": f"column_means_{name}", "device": device, "dtype": str(dtype), "runs": runs}
    for way in ways:
        result[f"{way}_ms"] = round(statistics.median(wall[way]) * 1000, 3)
        if on_card:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            ways[way]()
            result[f"{way}_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    if "kernel" in ways:
        result["kernel_over_blocks"] = ratio(wall["kernel"], wall["blocks"])
    return result


Seconds = dict[str, list[float]]


def time_case(case: Case, runs: int) -> tuple[Seconds, Seconds]:
    """Wall and processor seconds of each variant in each run; who begins alternates."""
    names = list(case.variants)
    wall: Seconds = {name: [] for name in names}
    cpu: Seconds = {name: [] for name in names}
    for run in range(-1, runs):  # run -1 warms up
        for name in names if run % 2 else reversed(names):
            start, cpu_start = time.perf_counter(), time.process_time()
            case.variants[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if run >= 0:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return wall, cpu


def peak_of(case: str, variant: str, threads: int) -> float:
    """Peak resident memory of a fresh process that runs one variant once, in MiB."""
    return printed_by(__file__, ["--peak", case, variant, "--threads", str(threads)], GIVE_BACK_FREED_MEMORY)


def print_peak(case: str, variant: str) -> None:
    """The other side of `peak_of`."""
    CASES[case]().variants[variant]()
    print(resident())


def ratio(measured: list[float], plain: list[float]) -> float:
    """Median over runs of a time against the plain variant's of the same run."""
    pairs = zip(measured, plain, strict=True)
    return round(statistics.median(time / beside for time, beside in pairs), 4)


def measure(name: str, runs: int, threads: int) -> dict[str, Any]:
    """All numbers of one case."""
    case = CASES[name]()
    names, plain, measured = list(case.variants), case.plain, case.measured
    wall, cpu = time_case(case, runs)
    del case  # its memory belongs to the processes that measure memory now
    peaks = {variant: peak_of(name, variant, threads) for variant in names}
    compared = {
        variant: {
            "ratio": ratio(wall[variant], wall[plain]),
            "cpu_ratio": ratio(cpu[variant], cpu[plain]),
            "extra_mib": round(peaks[variant] - peaks[plain], 1),
        }
        for variant in names
        if variant != plain
    }
    return {
        **compared.pop(measured),
        "runs": runs,
        "seconds": {variant: round(statistics.median(s), 4) for variant, s in wall.items()},
        "rivals": {variant.replace(" ", "_"): numbers for variant, numbers in compared.items()},
    }


def row(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    plain, measured, *_ = result["seconds"].values()
    rival = result["rivals"].get("plain_softmax")
    beside = (f"{rival['ratio']:.3f}", f"{rival['extra_mib']:.1f}") if rival else ("–", "–")
    ratios = (f"{result[one]:.3f}" for one in ("ratio", "cpu_ratio"))
    own = (f"{plain:.3f}", f"{measured:.3f}", *ratios, f"{result['extra_mib']:.1f}")
    return (name, *own, *beside, str(result["runs"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="timed runs per variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--kernels", action="store_true", help="the column means alone, one line of JSON for each shape"
    )
    parser.add_argument("--shapes", nargs="+", choices=KERNEL_SHAPES, default=list(KERNEL_SHAPES))
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(*options.peak)
        return
    if options.kernels:
        for name in options.shapes:
            print(json.dumps(measure_kernels(name, options.runs)), flush=True)
        return
    print(f"{options.threads} threads, torch {torch.__version__}; aims: ratio 1.05, extra 64 MiB")
    results = {}
    for name in options.only:
        results[name] = measure(name, options.runs, options.threads)
        print(f"{name}: ratio {results[name]['ratio']:.3f}", file=sys.stderr, flush=True)
    heads = ("case", "plain s", "with s", "ratio", "cpu", "extra MiB", "softmax", "MiB", "runs")
    rows = [row(name, result) for name, result in results.items()]
    print(markdown_lines(heads, rows, right=range(1, len(heads))))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
