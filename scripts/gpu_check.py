"""What a GPU makes of this framework: one JSON line a figure, then a table against the aims.

Steps are those of Stable Diffusion 1.5's shape at 512x384 with DINOv2-g/14 (1037 reference tokens) and random weights,
in bf16 with AdamW; ``--shape small --device cpu`` runs the same code on the tiny model, where figures mean nothing.
A part that fails, or for which no time is left, is a line that says so, and the others go on.

- ``loop``: `i2am train`'s loop (Lightning, callbacks, loader) against the bare step of the same objective.
- ``steps``: baseline and refined, cached and not, and diffusers' usual loop, in turn in the same rounds.
- ``waits``: how often the host waits for the GPU in a training step, and in a traced and a plain sampling.
- ``sampling``: ten guided steps at batch 1, traced and not; extra peak memory of a capture at batch 1 and 8.
- ``precision``: how far half-precision encoders are from float32.
- ``growth``: what capture and losses of the finest layer cost by reference tokens and picture size; also as a plot.
- ``compiled``: seconds of the first compiled step, and the share of the card's peak arithmetic that steps reach.
- ``batches``: images per second and peak memory by batch size, baseline and refined, cached and not, checkpointed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmark_losses import Bench as LossBench
from benchmark_losses import Case
from benchmark_training import SIZES, Bench, say
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from i2am_train.attention import trace
from i2am_train.attention.compiled import guard_hooks
from i2am_train.config.store import compose
from i2am_train.data.cache import ENCODED, TOKENS
from i2am_train.data.module import TryOnDataModule
from i2am_train.models.graphs import release_graphs
from i2am_train.models.sampling import sample
from i2am_train.ops.attention import column_means
from i2am_train.reporting.figures.canvas import STYLE, save_figure
from i2am_train.reporting.table import markdown_lines
from i2am_train.trainers import make_trainer
from i2am_train.training.module import TryOnModule
from i2am_train.training.step import encode_pictures
from i2am_train.types import GridSize

Figures = Iterator[tuple[str, float | str, str]]
"""Name, value and aim of each figure."""

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16, from the vendor's data sheets, by a part of the card's name."""
REFERENCES = {257: GridSize(16, 16), 577: GridSize(24, 24), 1037: GridSize(37, 28), 2305: GridSize(48, 48)}
"""Patches of a reference by the number of its tokens, of which one is the class token."""
PICTURES = (GridSize(512, 384), GridSize(768, 576), GridSize(1024, 768))


class Check:
    """The networks of all parts, and what they are measured with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.bench = Bench(options.shape, options.device, options.batch)
        self.on_gpu = self.bench.on_gpu
        self.growth: dict[str, list[tuple[int, float]]] = {}
        """Pairs of patches and milliseconds, by what was measured."""

    def wait(self) -> None:
        """Until all is done that was handed over."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """Of one of ``times`` in a row, which are handed over without a wait between them."""
        work()
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def peak(self, work: Callable[[], Any]) -> float:
        """Most memory in use, MiB; 0 on a CPU."""
        if not self.on_gpu:
            work()
            return 0.0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20

    def waits(self, work: Callable[[], Any]) -> int:
        """How often the host waited for the GPU, as CUDA's own debug mode sees it; 0 on a CPU."""
        work()
        if not self.on_gpu:
            return 0
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return waits_among(seen)


def waits_among(seen: Sequence[warnings.WarningMessage]) -> int:
    """How many warnings are those of CUDA's debug mode; their places are said."""
    found = [f"{one.filename}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
    for place in sorted(set(found)):
        say(f"waits: {place}")
    return len(found)


# -- the loop ------------------------------------------------------------------------------------------------------


class Rows(Dataset[dict[str, Any]]):
    """Encoded samples of noise, as a cache of float16 gives them."""

    def __init__(self, bench: Bench, count: int) -> None:
        self.indices = list(range(count))
        self.row = {
            name: (value[0].half() if value.is_floating_point() else value[0]).cpu()
            for name, value in bench.encoded.items()
        }

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: Any) -> dict[str, Any]:
        index = item[1] if isinstance(item, tuple) else item
        return self.row | {"name": str(index), "garment_name": str(index), "index": index, "paired": True}


class NoiseModule(TryOnDataModule):
    """The package's loaders, over noise."""

    def __init__(self, config: Any, rows: Rows) -> None:
        super().__init__(config.data, Path())
        self.rows = rows

    def train_dataset(self) -> Any:
        """The noise."""
        return self.rows


class Timer(L.Callback):
    """Seconds of a step between ``first`` and ``last``, without a wait in between."""

    def __init__(self, check: Check, first: int, last: int) -> None:
        self.check, self.moments, self.times = check, (first, last), [0.0, 0.0]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Takes the time at the first and at the last step."""
        if trainer.global_step in self.moments:
            self.check.wait()
            self.times[self.moments.index(trainer.global_step)] = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of a step."""
        return (self.times[1] - self.times[0]) / (self.moments[1] - self.moments[0])


def trained(check: Check, arm: str, steps: int, *own: L.Callback) -> None:
    """So many steps of the package's own loop, from encoded noise."""
    bench, options = check.bench, check.options
    with tempfile.TemporaryDirectory() as folder:
        config = compose(
            "train",
            [
                f"data.batch_size={options.batch}", f"data.workers={options.workers}", f"optimization.steps={steps}",
                f"optimization.precision={'bf16-mixed' if check.on_gpu else '32-true'}", "validation.samples=0",
                f"trainer.accelerator={'gpu' if check.on_gpu else 'cpu'}", "trainer.devices=1",
                "trainer.log_every_n_steps=10", "trainer.progress_bar=false", "tracking.wandb=disabled",
                f"output={folder}", "optimization.learning_rate=1e-6",
            ],
        )  # fmt: skip
        module = TryOnModule(bench.model, bench.objectives[arm], config.optimization, cached=True)
        data = NoiseModule(config, Rows(bench, options.batch * (steps + 1)))
        try:
            make_trainer(config, Path(folder), own).fit(module, data)
        finally:
            module.teardown("fit")
            bench.model.to(bench.device)


def loop(check: Check) -> Figures:
    """The package's loop against the bare step."""
    count = check.options.steps
    for arm in ("refined", "baseline"):
        check.bench.prepare(f"{arm}_cached")
        bare = check.seconds(lambda arm=arm: check.bench.our_step(arm, cached=True), count)  # type: ignore[misc]
        timer = Timer(check, 3, 3 + count)
        trained(check, arm, 3 + count, timer)
        yield f"{arm}: loop, ms a step", 1e3 * timer.seconds, ""
        yield f"{arm}: bare, ms a step", 1e3 * bare, ""
        yield f"{arm}: loop / bare", timer.seconds / bare, "at most 1.05"


def steps(check: Check) -> Figures:
    """Variants in turn, as `benchmark_training` does; medians of rounds."""
    names = ("baseline", "baseline_cached", "refined_cached", "diffusers")
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        check.bench.seconds(name)
    for number in range(check.options.rounds):
        for name in names if number % 2 else reversed(names):
            times[name].append(check.bench.seconds(name))
    for name, seconds in times.items():
        yield f"{name}, ms a step", 1e3 * statistics.median(seconds), ""

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    yield "refined / baseline, cached", ratio("refined_cached", "baseline_cached"), "at most 1.03"
    yield "speed of our uncached step / diffusers' loop", ratio("diffusers", "baseline"), "at least 1.2"
    yield "speed of our cached step / diffusers' loop", ratio("diffusers", "baseline_cached"), ""


# -- sampling ------------------------------------------------------------------------------------------------------


def sampler(check: Check, batch: int, count: int, *, traced: bool, cuda_graphs: bool = True) -> Callable[[], Any]:
    """Guided steps of the public sampler, in bf16 on a GPU."""
    model = check.bench.model.eval()
    pictures = [torch.zeros(batch, 3, *model.image_size, device=check.bench.device) for _ in range(3)]

    def run() -> None:
        with torch.inference_mode(), check.bench.autocast(torch.bfloat16), trace(model) if traced else nullcontext():
            sample(model, *pictures, seeds=range(batch), steps=count, cuda_graphs=cuda_graphs)

    return run


def sampling(check: Check) -> Figures:
    """Whole calls: encoding and decoding included."""
    check.bench.place_frozen(check.bench.device)
    count = 10 if check.on_gpu else 2
    plain, traced = (sampler(check, 1, count, traced=way) for way in (False, True))
    plain(), traced()
    pairs = []
    for number in range(check.options.rounds):
        both = {way: check.seconds(work, 1) for way, work in ((False, plain), (True, traced))[:: 1 - 2 * (number % 2)]}
        pairs.append((both[True], both[False]))
    yield (
        "plain sampling, ms a guided step, batch 1",
        1e3 * statistics.median(p for _, p in pairs) / count,
        "at most 25",
    )
    yield "traced / plain sampling, batch 1", statistics.median(t / p for t, p in pairs), "at most 1.05"
    calls = [sampler(check, 1, count, traced=way, cuda_graphs=False) for way in (False, True)]
    alone, heard = (check.seconds(work, 3) for work in calls)
    yield "plain sampling without CUDA graphs, ms a guided step, batch 1", 1e3 * alone / count, ""
    yield "traced / plain sampling without CUDA graphs, batch 1", heard / alone, ""
    replayed, called = (
        check.seconds(sampler(check, 8, count, traced=False, cuda_graphs=use), 1) for use in (True, False)
    )
    yield "plain sampling, ms a guided step, batch 8", 1e3 * replayed / count, ""
    yield "plain sampling without CUDA graphs / with, time, batch 8", called / replayed, ""
    for batch in (1, 8):  # what a replay uses, torch does not count
        without, with_it = (
            check.peak(sampler(check, batch, 2, traced=way, cuda_graphs=False)) for way in (False, True)
        )
        yield f"extra peak memory of a capture, batch {batch}, MiB", with_it - without, "at most 64"
        yield f"memory that CUDA graphs keep, batch {batch}, MiB", kept_by_graphs(check, batch), ""


def kept_by_graphs(check: Check, batch: int) -> float:
    """MiB until they are released, of a plain and a traced run; 0 on a CPU."""
    unet = check.bench.model.unet
    release_graphs(unet)
    for traced in (False, True):
        sampler(check, batch, 2, traced=traced)()
    with_them = reserved(check)
    release_graphs(unet)
    return with_them - reserved(check)


def reserved(check: Check) -> float:
    """MiB that torch holds and cannot give back."""
    if not check.on_gpu:
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def waits(check: Check) -> Figures:
    """Of the sampler, then of the loop's steps that do not log."""
    check.bench.place_frozen(check.bench.device)
    for name, traced in (("plain", False), ("traced", True)):
        few, more = (check.waits(sampler(check, 1, count, traced=traced)) for count in (2, 4))
        yield f"host waits a step, {name} sampling", (more - few) / 2, "0"
        yield f"host waits at the ends, {name} sampling", 2 * few - more, ""

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if check.on_gpu and trainer.global_step == 3:
                torch.cuda.set_sync_debug_mode("warn")
            if check.on_gpu and trainer.global_step == 8:
                torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trained(check, "refined", 9, Watch())
    yield "host waits in five steps of the training loop", waits_among(seen), "0"


# -- arithmetic ----------------------------------------------------------------------------------------------------


def flops_of(check: Check) -> float:
    """Floating-point operations of a cached baseline step: products and convolutions, both passes."""
    with FlopCounterMode(display=False) as counter:
        check.bench.our_step("baseline", cached=True)
    return float(counter.get_total_flops())


def compiled(check: Check) -> Figures:
    """Channels last; repeated blocks under torch.compile, as `optimization.compile` sets it, then the residual blocks,
    too. At batch 32, or the largest below that is asked for."""
    bench = check.bench
    bench.resize(max((batch for batch in check.options.batches if batch <= 32), default=check.options.batch))
    bench.prepare("baseline_cached")
    flops, peak = flops_of(check), card_peak()
    eager = check.seconds(lambda: bench.our_step("baseline", cached=True), 5)
    yield "TFLOP of a cached step", flops / 1e12, ""
    bench.model.unet.to(memory_format=torch.channels_last)
    seconds = check.seconds(lambda: bench.our_step("baseline", cached=True), 5)
    yield "contiguous / channels last, time", eager / seconds, ""
    bench.model.unet.to(memory_format=torch.contiguous_format)
    if peak:
        yield "model FLOP utilisation, eager, %", 100 * flops / eager / peak, ""
    guard_hooks()
    for name, kinds in (("blocks", ("BasicTransformerBlock",)), ("blocks and ResNets", ("ResnetBlock2D",))):
        for module in bench.model.unet.modules():
            if type(module).__name__ in kinds:
                module.compile(dynamic=False)
        start = time.perf_counter()
        bench.our_step("baseline", cached=True)
        check.wait()
        yield f"first step, compiled {name}, s", time.perf_counter() - start, "at most 45" if name == "blocks" else ""
        seconds = check.seconds(lambda: bench.our_step("baseline", cached=True), 5)
        yield f"eager / compiled {name}, time", eager / seconds, ""
        if peak:
            yield f"model FLOP utilisation, compiled {name}, %", 100 * flops / seconds / peak, ""
    for module in bench.model.unet.modules():
        module._compiled_call_impl = None
    bench.resize(check.options.batch)


def card_peak() -> float:
    """Operations a second of this card, 0 if it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def precision(check: Check) -> Figures:
    """Half-precision encoders against float32: root mean square of the difference over that of the values."""
    bench = check.bench
    bench.place_frozen(bench.device)
    exact, half = (encode_pictures(m, bench.pictures) for m in (bench.model, bench.model.with_encoders(torch.bfloat16)))
    for name in (f"{ENCODED[0]}_mean", TOKENS):
        apart = (half[name] - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        yield f"bf16 encoders, {name}, relative difference", float(apart), ""


def batches(check: Check) -> Figures:
    """Images a second and peak memory of all variants by batch size, and of one with gradient checkpointing."""
    bench = check.bench
    bench.model.train()
    for variant in ("refined_cached", "baseline_cached", "refined", "baseline"):
        yield from by_batch(check, variant, variant.replace("_", ", "))
    bench.model.unet.enable_gradient_checkpointing()
    yield from by_batch(check, "refined_cached", "refined, cached, checkpointed")
    bench.model.unet.disable_gradient_checkpointing()
    bench.resize(check.options.batch)


def by_batch(check: Check, variant: str, name: str) -> Figures:
    """What does not fit is said, and nothing larger is tried."""
    bench, objective, cached = check.bench, variant.removesuffix("_cached"), variant.endswith("_cached")
    for batch in check.options.batches:
        try:
            bench.resize(batch)
            bench.prepare(variant)
            peak = check.peak(lambda: bench.our_step(objective, cached=cached))
            seconds = check.seconds(lambda: bench.our_step(objective, cached=cached), 2)
        except torch.OutOfMemoryError:
            yield f"{name}, batch {batch}: images a second", "does not fit", ""
            return
        yield f"{name}, batch {batch}: images a second", batch / seconds, ""
        yield f"{name}, batch {batch}: peak GiB", peak / 1024, ""


def growth(check: Check) -> Figures:
    """Eight heads of 40 channels, one sample: both column means, and the refined losses without the matrix."""
    cell = 8 if check.options.shape == "true" else 64
    for size, tokens in [*((PICTURES[0], tokens) for tokens in REFERENCES), *((size, 1037) for size in PICTURES[1:])]:
        generated, reference = GridSize(size.height // cell, size.width // cell), REFERENCES[tokens]
        losses = LossBench(Case(generated, reference, 8), str(check.bench.device))
        inputs = [
            one.detach().to(torch.bfloat16 if check.on_gpu else one.dtype)
            for one in (losses.tokens.generated, losses.tokens.reference)
        ]
        for name, work in (
            ("capture", lambda inputs=inputs: column_means(*inputs)),  # type: ignore[misc]
            ("losses", lambda losses=losses: losses.step("blocks")),  # type: ignore[misc]
        ):
            cost = 1e3 * check.seconds(work, 3)
            check.growth.setdefault(name, []).append((generated.tokens * reference.tokens, cost))
            yield f"{name} of a layer, {size.height}x{size.width}, {tokens} tokens, ms", cost, ""


def growth_plot(costs: dict[str, list[tuple[int, float]]]) -> Figure:
    """Milliseconds over pairs of patches; the grey lines grow as the pairs do."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, points in costs.items():
            pairs, times = zip(*sorted(points), strict=True)
            axes.loglog(pairs, times, "o-", label=name)
            axes.loglog(pairs, [times[0] * one / pairs[0] for one in pairs], color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set(xlabel="pairs of generated and reference patches", ylabel="milliseconds")
        axes.legend()
    return figure


PARTS: dict[str, Callable[[Check], Figures]] = {
    part.__name__: part for part in (loop, steps, sampling, waits, precision, growth, compiled, batches)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check.jsonl"), help="lines are appended")
    parser.add_argument("--shape", choices=SIZES, default="true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of the loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=290, help="seconds after which no further part begins")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    started = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --shape small --device cpu tries the script without one")
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    about = {"machine": machine, "torch": torch.__version__, "shape": options.shape, "batch": options.batch}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    check = Check(options)
    rows = []
    for part in options.only:
        for name, value, aim in figures(check, part, options.limit - (time.monotonic() - started)):
            shown = value if isinstance(value, str) else f"{value:.4g}"
            rows.append((part, name, shown, aim))
            line = {"part": part, "figure": name, "value": value, "aim": aim, **about}
            with options.output.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            say(f"{time.monotonic() - started:.0f} s, {part}: {name} {shown} {aim and f'({aim})'}")
    print(", ".join(f"{name} {value}" for name, value in about.items()), f"load {os.getloadavg()[0]:.1f}", sep=", ")
    if check.growth:
        save_figure(growth_plot(check.growth), options.output.with_suffix(".png"), dpi=150)
    print(markdown_lines(("part", "figure", "value", "aim"), rows, right=(2,)))


def figures(check: Check, part: str, left: float) -> Figures:
    """Those of a part; why there are none, if there are none."""
    if left <= 0:
        yield part, "no time left", ""
        return
    try:
        yield from PARTS[part](check)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield part, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", ""


if __name__ == "__main__":
    main()
