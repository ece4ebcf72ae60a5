"""``i2am explain``: all attribution maps of a sample: pictures, a folder of data, a page to explore."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am_train.config.explanation import TRYON, ExplainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from i2am_train.data.sample import TryOnSample
    from i2am_train.evaluation.evaluator import Explained
    from i2am_train.models.sampling import SamplingStep
    from i2am_train.models.tryon import TryOnModel
    from i2am_train.reporting.explained import CleanImage, ExplainedSample, Origin

MAY_DIFFER = ("output", "device")
"""Options that change nothing in what is drawn."""
KEPT = ("images", "masks")
"""Folders of the sample's own pictures, beside those that are drawn."""


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One checkpoint on one sample."""

    folder: str
    """Where its files go, inside the run folder."""
    sample: ExplainedSample
    figures: dict[str, Any]
    """Drawn pictures by name."""


def run(config: ExplainConfig) -> None:
    """Explain the samples, or the picture of another model, and say where pictures and page lie."""
    from i2am_train.locks import locked
    from i2am_train.reporting.explorer import PAGE

    if config.model == TRYON:
        with locked(folder_of(config)):
            folder = explain(config)
    else:
        from i2am_train.workflows import explain_other

        with locked(explain_other.folder_of(config)):
            folder = explain_other.explain_picture(config)
    pictures = len([path for path in folder.rglob("*.png") if path.parent.name not in KEPT])
    size = (folder / PAGE).stat().st_size / 10**6
    print(f"{pictures} pictures, scores, maps and {PAGE} ({size:.1f} MB) in {folder}")


def explain(config: ExplainConfig) -> Path:
    """Sample each image once, keep and draw its maps, make the page of them, and return the folder.

    Raises:
        I2AMError: device, checkpoint, data, sample, layer or patch do not fit; nothing is written then.
    """
    from i2am_train.config.build import plain
    from i2am_train.data.opening import prepare_data
    from i2am_train.files import write_text
    from i2am_train.fingerprints import data_state
    from i2am_train.models.loading import load_model, model_folder
    from i2am_train.ops.devices import chosen_device
    from i2am_train.reporting.explained import write_explained
    from i2am_train.reporting.explorer import PAGE, explorer_page
    from i2am_train.runs import RunFolder

    device = chosen_device(config.device)
    names = _labels(config.checkpoints)
    models = {name: load_model(path, config.data) for name, path in names.items()}
    root = prepare_data(config.data, folder_of(config))
    data, samples = data_state(root).fingerprint, _samples(config, root)
    folders = {name: str(model_folder(path)) for name, path in names.items()}
    where = list(folders.values())
    settings = plain(config) | {"checkpoint": where if len(where) > 1 else where[0]}
    RunFolder.check(folder_of(config), settings, may_differ=MAY_DIFFER)  # before images are made
    cases = {
        name: [
            _case(config, name, model, sample, device, _origin(config, folders[name], data))
            for sample in samples
        ]
        for name, model in models.items()
    }
    page_data = _page_data(config, samples, cases)
    folder = RunFolder.open(folder_of(config), settings, may_differ=MAY_DIFFER)
    folder.start(seed=config.sampling.seed, data=data)
    for case in (case for made in cases.values() for case in made):
        write_explained(folder / case.folder, case.sample)
        for name, figure in case.figures.items():
            _save(figure, folder / case.folder / f"{name}.png")
    page = explorer_page(page_data, _making(config, folder.manifest))
    write_text(folder / PAGE, page)
    folder.finish()
    return folder.path


def _labels(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by their short name, or by all of their path where that is not unique."""
    from i2am_train.runs import checkpoint_label

    short = [checkpoint_label(Path(checkpoint)) for checkpoint in checkpoints]
    unique = len(set(short)) == len(short)
    return dict(zip(short if unique else checkpoints, checkpoints, strict=True))


def folder_of(config: ExplainConfig) -> Path:
    """``output``, or a folder in ``runs/`` named after what is explained."""
    if config.output is not None:
        return config.output
    checkpoints = "+".join(Path(checkpoint).name for checkpoint in config.checkpoints)
    samples = "+".join(map(str, config.samples))
    name = f"explain-{checkpoints}-{config.split}{samples}-{config.pairing}"
    return Path.cwd() / "runs" / name


def _origin(config: ExplainConfig, checkpoint: str, data: str) -> Origin:
    from i2am_train.reporting.explained import Origin

    sampling = config.sampling
    return Origin(
        checkpoint=checkpoint,
        data=data,
        guidance=sampling.guidance,
        steps=sampling.steps,
        seed=sampling.seed,
    )


def _case(
    config: ExplainConfig,
    name: str,
    model: TryOnModel,
    sample: TryOnSample,
    device: torch.device,
    origin: Origin,
) -> _Case:
    """Samples one image with its attention, and draws it."""
    from torch.utils.data import default_collate

    from i2am_train.data.sample import batch_on
    from i2am_train.evaluation.evaluator import generate_with_attention

    model = model.eval().to(device)
    batch = batch_on(default_collate([sample]), model.device)
    clean = CleanImages(config.sampling.steps, config.attribution.time_groups)
    explained = generate_with_attention(
        model,
        batch,
        config.sampling,
        config.attribution,
        matrix_layers=config.matrix_layers,
        on_step=clean,
    )
    described = _sample(config, origin, explained, clean.decoded(model))
    alone = len(config.checkpoints) == len(config.samples) == 1
    return _Case(
        folder="" if alone else f"{name.replace('/', '_')}-{config.split}{sample['index']}",
        sample=described,
        figures=_figures(described) | {"centers": _center_figure(explained)},
    )


def _page_data(
    config: ExplainConfig, samples: list[TryOnSample], cases: dict[str, list[_Case]]
) -> dict[str, Any]:
    from i2am_train.reporting.explorer import Explanation, explored, explorer_data

    models = {
        name: [
            Explanation(generated=case.sample.images["generated"], maps=case.sample.maps)
            for case in made
        ]
        for name, made in cases.items()
    }
    return explorer_data([explored(sample) for sample in samples], models, config.attribution)


def _making(config: ExplainConfig, manifest: dict[str, Any]) -> dict[str, str]:
    """What the page says of its origin."""
    from i2am_train.config.build import plain
    from i2am_train.reporting.provenance import flat, provenance_rows

    return {
        **dict(provenance_rows(manifest)),
        "Checkpoints": ", ".join(config.checkpoints),
        "Sampling": flat(plain(config.sampling)),
        "Attribution": flat(plain(config.attribution)),
    }


def _samples(config: ExplainConfig, root: Path) -> list[TryOnSample]:
    """The chosen samples."""
    from i2am_train.data.opening import list_length, open_dataset, reading_of
    from i2am_train.errors import DataError

    reading = reading_of(config.data)
    total = list_length(root, config.split, config.pairing, reading)
    for index in config.samples:
        if index >= total:
            raise DataError(
                f"sample={index} is out of range: the {config.split} split of {root} has "
                f"{total} samples, numbered from 0 to {total - 1}."
            )
    dataset = open_dataset(
        root, config.split, config.pairing, config.data.size, reading, indices=config.samples
    )
    return [dataset[position] for position in range(len(dataset))]


class CleanImages:
    """Keeps the clean latent that the model predicts at the end of each time group."""

    def __init__(self, steps: int, groups: int) -> None:
        from i2am_train.attention.maps import time_groups

        self._last = {run.stop - 1 for run in time_groups(steps, groups)}
        self._kept: list[SamplingStep] = []

    def __call__(self, step: SamplingStep) -> None:
        """What the sampler calls after each step."""
        if step.step_index in self._last:
            self._kept.append(step)

    def decoded(self, model: TryOnModel) -> tuple[CleanImage, ...]:
        """The first sample's images, noisiest first."""
        import torch

        from i2am_train.reporting.explained import CleanImage

        with torch.no_grad():
            images = model.decode_latents(torch.cat([step.clean[:1] for step in self._kept]))
        return tuple(
            CleanImage(step.step_index, step.timestep, _picture(image))
            for step, image in zip(self._kept, images, strict=True)
        )


def _picture(image: Tensor) -> Any:
    """A ``[3, height, width]`` image in [-1, 1] as uint8 ``[height, width, 3]``."""
    from i2am_train.ops.images import to_uint8

    return to_uint8(image).permute(1, 2, 0).cpu().numpy()


def _sample(
    config: ExplainConfig,
    origin: Origin,
    explained: Explained,
    clean: tuple[CleanImage, ...],
) -> ExplainedSample:
    """All that figures need, as plain arrays."""
    from i2am_train.evaluation.evaluator import attention_scores, value_or_none
    from i2am_train.reporting.explained import IMAGES, MASKS, ExplainedSample
    from i2am_train.runs import checkpoint_label

    batch = explained.batch
    generated, reference = _patches(config, explained)
    scores = attention_scores(explained, config.attribution)
    known = batch["correspondence"][0].isfinite().any()
    pictures: dict[str, Any] = {**batch, "generated": explained.generated}
    return ExplainedSample(
        name=batch["name"][0],
        garment_name=batch["garment_name"][0],
        paired=bool(batch["paired"][0]),
        layer=explained.layer,
        images={name: _picture(pictures[name][0]) for name in IMAGES},
        masks={name: pictures[f"{name}_mask"][0].numpy() for name in MASKS},
        correspondence=batch["correspondence"][0].numpy() if known else None,
        clean=clean,
        maps=explained.maps,
        scores={name: value_or_none(float(value[0])) for name, value in scores.items()},
        generated_patches=tuple(generated),
        reference_patches=tuple(reference),
        model=checkpoint_label(Path(origin.checkpoint)),
        origin=origin,
        delta=config.attribution.delta,
        weighting=config.attribution.weighting,
        time_groups=config.attribution.time_groups,
    )


def _figures(sample: ExplainedSample) -> dict[str, Any]:
    """The paper's figures that one sample allows, by name."""
    from i2am_train.reporting.figures.paper import plan
    from i2am_train.reporting.figures.sheet import draw_sheet

    planned, _ = plan([sample])
    return {figure.name: draw_sheet(figure.sheet([sample])) for figure in planned}


def _patches(
    config: ExplainConfig, explained: Explained
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The generated and the reference patches that get maps: the user's, or some of the garment."""
    from i2am_train.evaluation.evaluator import garment_patches
    from i2am_train.ops.grids import mask_on_grid, spread_patches

    generated = config.generated_patches or spread_patches(
        garment_patches(explained)[0], explained.generated_grid
    )
    reference = config.reference_patches or spread_patches(
        mask_on_grid(explained.batch["garment_mask"], explained.reference_grid)[0],
        explained.reference_grid,
    )
    return generated, reference


def _center_figure(explained: Explained) -> Any:
    """The sample beside the field of its attention centres."""
    from i2am_train.evaluation.evaluator import make_panels
    from i2am_train.evaluation.results import stack_panels
    from i2am_train.reporting.figures.samples import sample_panel

    panels = stack_panels(make_panels(explained, {int(explained.batch["index"][0])}))
    return sample_panel({"model": panels}, labels={"model": "generated"})


def _save(figure: Any, path: Path) -> None:
    from i2am_train.reporting.figures.canvas import save_figure

    save_figure(figure, path, dpi=200)
