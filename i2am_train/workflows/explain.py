"""``i2am explain``: all attribution maps of a sample: pictures, a folder of data, a page to explore.

``i2am detect``: the object detection experiment on COCO, with Paint-by-Example and detectors (paper 5.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import default_collate

from i2am_train.attention.known import known_models
from i2am_train.attention.maps import patch_indices
from i2am_train.attention.recipe import describe_layers, layer_name
from i2am_train.attention.store import time_groups
from i2am_train.attention.trace import trace
from i2am_train.config.explanation import OTHER_MODELS_OPTIONS, TRYON, DetectConfig, ExplainConfig, FaithfulConfig
from i2am_train.config.locations import checkpoint_folder, revisions
from i2am_train.config.models import SamplingConfig
from i2am_train.config.options import plain
from i2am_train.data.dataset import TryOnDataset, TryOnSample, batch_on, list_length, prepare_data, reading_of
from i2am_train.data.picture_files import read_photograph, read_region
from i2am_train.data.pictures import Mask
from i2am_train.detection.experiment import run_experiment
from i2am_train.detection.report import tables_of
from i2am_train.errors import ConfigError, DataError
from i2am_train.evaluation.explaining import explain_batch, explain_picture, to_pictures
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, CleanImage, Explanation, write_explanation
from i2am_train.files import entries_of, file_fingerprint, read_object, write_text
from i2am_train.fingerprints import data_state
from i2am_train.locks import locked
from i2am_train.models.by_name import load_model, model_folder, with_layers, with_precision
from i2am_train.models.loaders import loader_of
from i2am_train.models.sampling import SamplingStep
from i2am_train.models.traceable import NO_GUIDANCE, Loader, Request, Source
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.grids import mask_on_grid, spread_patches
from i2am_train.ops.numerics import chosen_device
from i2am_train.reporting.explorer import PAGE, explorer_data, explorer_page
from i2am_train.reporting.faithfulness import RESULTS, sample_sentence
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.figures.paper import figures_of
from i2am_train.reporting.pages import flat, provenance_rows
from i2am_train.reporting.table import terminal
from i2am_train.runs import RunFolder, checkpoint_label, folder_beside
from i2am_train.tracking.session import sync_advice
from i2am_train.types import GridSize, Pairing, Split

KEPT = ("images", "masks")
"""Folders of the explanation's own pictures, beside those that are drawn."""
FILES = ("image", "mask", "reference", "reference_mask", "adapter")
"""Options of other models that name a file."""
ALWAYS_TAKEN = ("reference_mask", "size")
MAY_DIFFER = ("output", "device")
"""Options that change nothing in what is drawn."""
DPI = 200


@dataclass(frozen=True, kw_only=True)
class _Made:
    """All that was computed, before anything is written."""

    settings: dict[str, Any]
    data: str | None
    """Fingerprint of the dataset."""
    models: Mapping[str, list[Explanation]]
    """By the name on the page."""
    about: Mapping[str, str]
    """What the page says of the models."""


def run(config: ExplainConfig) -> None:
    """Explain the samples, or the picture of another model, and say where pictures and page lie."""
    with locked(config.folder):
        folder = explain(config)
    pictures = len([path for path in folder.rglob("*.png") if path.parent.name not in KEPT])
    size = (folder / PAGE).stat().st_size / 10**6
    print(f"{pictures} pictures, scores, maps and {PAGE} ({size:.1f} MB) in {folder}")


def explain(config: ExplainConfig) -> Path:
    """Sample each picture once, keep and draw its maps, make the page of them, and return the folder.

    Raises:
        I2AMError: device, checkpoint, data, sample, pictures, layer or patch do not fit; nothing is written then.
    """
    config = with_layers(config)
    if config.model == TRYON:
        config = with_precision(config)
        made = _of_samples(config)
    else:
        made = _of_pictures(config)
    several = sum(map(len, made.models.values())) > 1
    explanations = {
        f"{name.replace('/', '_')}-{config.split}{one.index}" if several else "": one
        for name, ones in made.models.items()
        for one in ones
    }
    figures = {place: figures_of(one) for place, one in explanations.items()}
    page = explorer_data(made.models, config.attribution)
    folder = RunFolder.open(config.folder, made.settings, may_differ=MAY_DIFFER)
    folder.start(seed=config.sampling.seed, data=made.data)
    for place, one in explanations.items():
        write_explanation(folder / place, one)
        for name, figure in figures[place].items():
            marks = " ".join(one.maps.marks)
            save_figure(figure, folder / place / f"{name}.png", dpi=DPI, description=marks)
    making = {
        **dict(provenance_rows(folder.manifest)),
        **made.about,
        "Sampling": flat(plain(config.sampling)),
        "Attribution": flat(plain(config.attribution)),
    }
    write_text(folder / PAGE, explorer_page(page, making))
    folder.finish()
    for mark in dict.fromkeys(mark for one in explanations.values() for mark in one.maps.marks):
        print(mark)
    return folder.path


def _with_patches(config: ExplainConfig, made: Explanation, **fields: Any) -> Explanation:
    """The explanation with the patches that get maps: the user's, or some of the region and of the reference.

    Raises:
        ConfigError: patches are given, and the reference's tokens have no place.
    """
    grid = made.grid(TO_GENERATED)
    generated = config.generated_patches or spread_patches(made.patches_inside(grid), grid)
    reference = config.reference_patches
    if TO_REFERENCE in made.directions:
        grid, seen = made.grid(TO_REFERENCE), made.seen_mask()
        anywhere = torch.zeros(grid.tokens, dtype=torch.bool)
        inside = anywhere if seen is None else mask_on_grid(torch.from_numpy(seen)[None], grid)[0]
        reference = reference or spread_patches(inside, grid)
    elif given := [n for n in ("generated_patches", "reference_patches") if getattr(config, n)]:
        raise ConfigError(
            f"{given[0]}= asks for maps between patches, and this model's reference tokens have no "
            "place in the reference picture. Leave it out."
        )
    fields |= {"generated_patches": tuple(generated), "reference_patches": tuple(reference)}
    return replace(made, **fields)


# ---- samples of a dataset ------------------------------------------------------------------------


def _of_samples(config: ExplainConfig) -> _Made:
    device = chosen_device(config.device)
    names = _labels(config.checkpoints)
    models = {name: load_model(path, config.data) for name, path in names.items()}
    for model in models.values():
        _check_attribution(config, model)
    root = prepare_data(config.data, config.folder)
    data, samples = data_state(root).fingerprint, _samples(config, root)
    folders = {name: str(model_folder(path)) for name, path in names.items()}
    where = list(folders.values())
    settings = plain(config) | {"checkpoint": where if len(where) > 1 else where[0]}
    RunFolder.check(config.folder, settings, may_differ=MAY_DIFFER)  # before images are made
    return _Made(
        settings=settings,
        data=data,
        models={
            name: [_of_sample(config, model.eval().to(device), sample, folders[name], data) for sample in samples]
            for name, model in models.items()
        },
        about={"Checkpoints": ", ".join(config.checkpoints), **known_causes(config, names, data)},
    )


def known_causes(config: ExplainConfig, checkpoints: Mapping[str, str], data: str) -> dict[str, str]:
    """What `i2am faithful` found of these very samples, where it lies beside their checkpoints, as the page says it.

    Args:
        config: samples, sampling, sizes.
        checkpoints: by their name on the page.
        data: fingerprint of the dataset.
    """
    if config.split is not Split.TEST or config.pairing is not Pairing.PAIRED:
        return {}
    said = []
    for name, checkpoint in checkpoints.items():
        folder = folder_beside(checkpoint_folder(checkpoint), "faithful")
        if not (folder / RESULTS).is_file() or RunFolder(folder, resumed=False).manifest.get("data") != data:
            continue
        with entries_of(folder / RESULTS):
            found = read_object(folder / RESULTS)
            settings, asked = found["settings"], plain(config)
            alike = settings["sampling"] == asked["sampling"] and all(
                settings["data"][side] == asked["data"][side] for side in ("height", "width")
            )
            rows = {row["index"]: row for row in found["samples"]} if alike else {}
        layer = layer_name(config.attribution.judged_layer)
        said += [
            f"{name}, sample {index}: {sample_sentence(rows[index], layer)} ({folder})"
            for index in config.samples
            if index in rows
        ]
    return {"Whether attention is a cause": "; ".join(said)} if said else {}


def _check_attribution(config: ExplainConfig, model: TryOnModel) -> None:
    """Refuses layers that the model has not, and patches outside the grids of the layer, before images are made.

    Raises:
        CaptureError: there is no such layer.
        ConfigError: a patch lies outside its grid.
    """
    attribution = config.attribution
    matrix_layers = [attribution.judged_layer, *(config.matrix_layers or ())]
    with trace(model, layers=attribution.layers, matrix_layers=matrix_layers):
        pass
    patch_indices(config.reference_patches, model.reference_grid)
    if block := re.fullmatch(r"up_blocks\.(\d+)\..*", layer_name(attribution.judged_layer)):
        # Each block of the decoder has twice the grid of the one before it; the last one's is the latents'.
        halvings = len(model.unet.up_blocks) - 1 - int(block[1])
        height, width = (-(-side // 2**halvings) for side in model.latent_size)
        patch_indices(config.generated_patches, GridSize(height, width))


def _labels(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by their short name, or by all of their path where that is not unique."""
    short = [checkpoint_label(Path(checkpoint)) for checkpoint in checkpoints]
    unique = len(set(short)) == len(short)
    return dict(zip(short if unique else checkpoints, checkpoints, strict=True))


def _samples(config: ExplainConfig, root: Path) -> list[TryOnSample]:
    """The chosen samples."""
    reading = reading_of(config.data)
    total = list_length(root, config.split, config.pairing, reading)
    for index in config.samples:
        if index >= total:
            raise DataError(
                f"sample={index} is out of range: the {config.split} split of {root} has "
                f"{total} samples, numbered from 0 to {total - 1}."
            )
    dataset = TryOnDataset(root, config.split, config.pairing, config.data.size, reading, indices=config.samples)
    return [dataset[position] for position in range(len(dataset))]


def _of_sample(
    config: ExplainConfig, model: TryOnModel, sample: TryOnSample, checkpoint: str, data: str | None
) -> Explanation:
    """Samples one image with its attention."""
    sampling = config.sampling
    group_ends = {run.stop - 1 for run in time_groups(sampling.steps, config.attribution.time_groups)}
    kept: list[SamplingStep] = []

    def keep(step: SamplingStep) -> None:
        if step.step_index in group_ends:
            kept.append(step)

    (made,) = explain_batch(
        model,
        batch_on(default_collate([sample]), model.device),
        sampling,
        config.attribution,
        matrix_layers=config.matrix_layers,
        on_step=keep,
    )
    return _with_patches(
        config,
        made,
        clean=_decoded(model, kept),
        model=checkpoint_label(Path(checkpoint)),
        origin={
            "checkpoint": checkpoint,
            "data": data,
            "guidance": sampling.guidance,
            "steps": sampling.steps,
            "seed": sampling.seed,
        },
    )


@torch.no_grad()
def _decoded(model: TryOnModel, steps: Sequence[SamplingStep]) -> tuple[CleanImage, ...]:
    """The first sample's images as the model predicted them in these steps."""
    images = model.decode_latents(torch.cat([step.clean[:1] for step in steps]))
    return tuple(
        CleanImage(step.step_index, step.timestep, picture)
        for step, picture in zip(steps, to_pictures(images), strict=True)
    )


# ---- pictures of the user, by other people's models ----------------------------------------------


def _of_pictures(config: ExplainConfig) -> _Made:
    # Before it is made, when a model of the hub may not be there yet.
    RunFolder.check(config.folder, plain(config), may_differ=(*MAY_DIFFER, "revisions"))
    loader = loader_of(config.model)
    check_options(config, loader)
    request, reference_mask = picture_request(config, loader)
    source = source_of(config)
    made = explain_picture(
        loader.load(source),
        request,
        config.attribution,
        name=config.picture,
        reference_mask=reference_mask,
        matrix_layers=config.matrix_layers,
    )
    recipe = made.maps.store.recipe
    titles = {known.name: known.title for known in known_models()}
    title = titles.get(recipe) or recipe or str(config.factory)
    inputs = {name: path.name for name, path in _files(config).items()}
    made = _with_patches(config, made, model=title, inputs=inputs, origin=_picture_origin(config))
    return _Made(
        settings=plain(config) | revisions(*config.checkpoints),
        data=None,
        models={title: [made]},
        about={
            "Model": f"{title}, recipe {recipe or 'of the factory'}",
            "Checkpoint": str(config.checkpoint or config.factory),
            "Layers": describe_layers(made.maps.store.model),
        },
    )


def check_options(config: ExplainConfig | FaithfulConfig, loader: Loader) -> None:
    """Refuses what the model lacks, and what it would silently pass over.

    Raises:
        ConfigError: an option is missing, of another model, or half of a pair.
    """
    given = {name for name in ("checkpoint", *OTHER_MODELS_OPTIONS) if getattr(config, name) not in (None, "")}
    possible = (*loader.needs, *loader.takes, *ALWAYS_TAKEN)
    missing = [name for name in loader.needs if name not in given]
    if missing:
        raise ConfigError(
            f"model={config.model} needs {', '.join(f'{name}=' for name in loader.needs)}; "
            f"{', '.join(f'{name}=' for name in missing)} was not given."
        )
    if unused := sorted(given - set(possible)):
        raise ConfigError(
            f"{unused[0]}= means nothing to model={config.model}, which takes "
            f"{', '.join(f'{name}=' for name in possible)}. Leave it out."
        )
    if (config.mask is None) != (config.image is None):
        alone, other = ("image", "mask") if config.mask is None else ("mask", "image")
        raise ConfigError(
            f"{alone}= was given without {other}=. Give both to fill a region in, or neither to "
            "make a picture from noise."
        )
    if len(config.checkpoints) > 1:
        raise ConfigError(f"model={config.model} takes one checkpoint at a time, not a list.")
    for name, instead in (
        ("precision", "computes in the numbers that it is loaded in"),
        ("sampler", "samples with the scheduler of its own folder or code"),
        ("cuda_graphs", "is run by a pipeline or code of its own"),
    ):
        if (asked := getattr(config.sampling, name)) != getattr(SamplingConfig(), name):
            raise ConfigError(
                f"sampling.{name}={asked} is for model=tryon; model={config.model} {instead}. Leave it out."
            )


def source_of(config: ExplainConfig | FaithfulConfig) -> Source:
    """Where the model comes from."""
    return Source(
        model=config.model,
        checkpoint=config.checkpoints[0] if config.checkpoints else None,
        adapter=config.adapter,
        factory=config.factory,
        recipe=config.recipe,
        options=config.recipe_options.given,
        guided=config.sampling.guidance > NO_GUIDANCE,
        device=chosen_device(config.device),
    )


def picture_request(config: ExplainConfig | FaithfulConfig, loader: Loader) -> tuple[Request, Mask | None]:
    """What the model is asked for, and the region that counts of the reference."""
    assert config.reference is not None
    reference = read_photograph(config.reference, "reference")
    image = mask = reference_mask = None
    if config.image is not None and config.mask is not None:
        image = read_photograph(config.image, "image")
        mask = read_region(config.mask, "mask", image, "image")
    if config.reference_mask is not None:
        reference_mask = read_region(config.reference_mask, "reference_mask", reference, "reference")
    request = Request(
        reference=reference,
        image=image,
        mask=mask,
        prompt=config.prompt,
        size=loader.size if config.size is None else GridSize(*config.size),
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        seed=config.sampling.seed,
    )
    return request, reference_mask


def _picture_origin(config: ExplainConfig) -> dict[str, Any]:
    """What the picture was made by and from; files by their fingerprints, too."""
    return {
        "model": config.model,
        "checkpoint": plain(config.checkpoint),
        "factory": config.factory,
        "prompt": config.prompt,
        **plain(config.sampling),
        "data": None,
        "files": {name: {"path": str(path), "sha256": file_fingerprint(path)} for name, path in _files(config).items()},
    }


def _files(config: ExplainConfig) -> dict[str, Path]:
    return {name: path for name in FILES if (path := getattr(config, name)) is not None}


# ---- the detection experiment --------------------------------------------------------------------------------------


def detect(config: DetectConfig) -> None:
    """Run the experiment, print its tables and say where everything lies.

    Raises:
        I2AMError: data, pipeline, detectors, device or folder do not fit the configuration; nothing is written then.
    """
    folder = config.folder
    with locked(folder):
        results = run_experiment(config, folder, chosen_device(config.device))
    console = Console(markup=False, emoji=False)
    for table in tables_of(results):
        console.print(terminal(table))
    print(f"Everything of this experiment: {folder} (page: {folder / 'report.html'})")
    if advice := sync_advice(config.tracking, folder):
        print(advice)
