"""``i2am explain model=NAME``: the attention of another people's model, on the user's own pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am_train.config.explanation import FACTORY, ExplainConfig
from i2am_train.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from i2am_train.data.arrays import Mask
    from i2am_train.evaluation.others import Attended
    from i2am_train.models.others.other_model import Loader, OtherModel, Request, Source
    from i2am_train.reporting.figures.explained import GridCell
    from i2am_train.reporting.others import ExplainedPicture
    from i2am_train.types import GridSize

FILES = ("image", "mask", "reference", "reference_mask", "adapter")
ALWAYS_TAKEN = ("reference_mask", "size")
MAY_DIFFER = ("output", "device")
"""Options that change nothing in what is drawn."""


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One model on one picture."""

    explained: ExplainedPicture
    figures: dict[str, Any]
    page: dict[str, Any]


def explain_picture(config: ExplainConfig) -> Path:
    """Make one picture, keep and draw its maps, make the page of them, and return the folder.

    Raises:
        I2AMError: model, weights, pictures or layers do not fit; nothing is written then.
    """
    from i2am_train.config.build import plain
    from i2am_train.config.hub import revisions
    from i2am_train.files import write_text
    from i2am_train.reporting.explorer import PAGE, explorer_page
    from i2am_train.reporting.figures.canvas import save_figure
    from i2am_train.reporting.others import write_picture
    from i2am_train.runs import RunFolder

    # Before it is made, when a model of the hub may not be there yet.
    RunFolder.check(folder_of(config), plain(config), may_differ=(*MAY_DIFFER, "revisions"))
    case = _explained(config)
    settings = plain(config) | revisions(*config.checkpoints)
    folder = RunFolder.open(folder_of(config), settings, may_differ=MAY_DIFFER)
    folder.start(seed=config.sampling.seed)
    marks = " ".join(case.explained.maps.marks)
    for name, figure in case.figures.items():
        save_figure(figure, folder / f"{name}.png", dpi=200, description=marks)
    write_picture(folder.path, case.explained)
    page = explorer_page(case.page, _making(config, case.explained, folder.manifest))
    write_text(folder / PAGE, page)
    folder.finish()
    for mark in case.explained.maps.marks:
        print(mark)
    return folder.path


def _explained(config: ExplainConfig) -> _Case:
    """All that is computed and drawn."""
    from i2am_train.evaluation.others import generate_attended
    from i2am_train.models.others.loaders import loader_of
    from i2am_train.ops.devices import chosen_device
    from i2am_train.reporting.others import figures

    loader = loader_of(config.model)
    _check_options(config, loader)
    request, reference_mask = _request(config, loader)
    source = _source(config, chosen_device(config.device))
    model = loader.load(source)
    made = generate_attended(model, request, config.attribution, config.matrix_layers)
    explained = _picture(config, model, request, made, reference_mask)
    return _Case(explained=explained, figures=figures(explained), page=_page(config, explained))


def _check_options(config: ExplainConfig, loader: Loader) -> None:
    """Refuses what the model lacks, and what it would silently pass over.

    Raises:
        ConfigError: an option is missing, of another model, or half of a pair.
    """
    from i2am_train.config.explanation import OTHER_MODELS_OPTIONS

    given = {
        name
        for name in ("checkpoint", *OTHER_MODELS_OPTIONS)
        if getattr(config, name) not in (None, "")
    }
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
    if config.sampling.sampler != "ddim":
        raise ConfigError(
            f"sampling.sampler={config.sampling.sampler} is for model=tryon; model={config.model} "
            "samples with the scheduler of its own folder or code. Leave it out."
        )


def _request(config: ExplainConfig, loader: Loader) -> tuple[Request, Mask | None]:
    """What the model is asked for, and the region that counts of the reference."""
    from i2am_train.data.picture_files import read_photograph, read_region
    from i2am_train.models.others.other_model import Request
    from i2am_train.types import GridSize

    assert config.reference is not None
    reference = read_photograph(config.reference, "reference")
    image = mask = reference_mask = None
    if config.image is not None and config.mask is not None:
        image = read_photograph(config.image, "image")
        mask = read_region(config.mask, "mask", image, "image")
    if config.reference_mask is not None:
        reference_mask = read_region(
            config.reference_mask, "reference_mask", reference, "reference"
        )
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


def _source(config: ExplainConfig, device: Any) -> Source:
    from i2am_train.models.others.other_model import NO_GUIDANCE, Source

    return Source(
        model=config.model,
        checkpoint=config.checkpoints[0] if config.checkpoints else None,
        adapter=config.adapter,
        factory=config.factory,
        recipe=config.recipe,
        options=config.recipe_options.given,
        guided=config.sampling.guidance > NO_GUIDANCE,
        device=device,
    )


def _picture(
    config: ExplainConfig,
    model: OtherModel,
    request: Request,
    made: Attended,
    reference_mask: Mask | None,
) -> ExplainedPicture:
    """All that figures need."""
    from i2am_train.evaluation.others import attended_scores
    from i2am_train.reporting.figures.explained import seen_mask
    from i2am_train.reporting.others import ExplainedPicture
    from i2am_train.types import Direction

    generated, reference = _patches(config, made, reference_mask)
    options = config.attribution
    masks: dict[Direction, Mask] = {}
    if made.mask is not None:
        masks[Direction.REFERENCE_TO_GENERATED] = made.mask
    if reference_mask is not None:
        masks[Direction.GENERATED_TO_REFERENCE] = seen_mask(reference_mask, made.maps)
    return ExplainedPicture(
        name=_name(config),
        model=_title(config, made.maps.store.recipe),
        layer=made.layer,
        generated=made.generated,
        reference=request.reference,
        generated_mask=made.mask,
        reference_mask=reference_mask,
        maps=made.maps,
        scores=attended_scores(made.maps, masks, options),
        generated_patches=tuple(generated),
        reference_patches=tuple(reference),
        origin=_origin(config),
        delta=options.delta,
        weighting=options.weighting,
        time_groups=options.time_groups,
    )


def _origin(config: ExplainConfig) -> dict[str, Any]:
    """What the picture was made by and from; files by their fingerprints, too."""
    from i2am_train.config.build import plain
    from i2am_train.fingerprints import file_fingerprint

    return {
        "model": config.model,
        "checkpoint": plain(config.checkpoint),
        "factory": config.factory,
        "prompt": config.prompt,
        "sampling": plain(config.sampling),
        "files": {
            name: {"path": str(path), "sha256": file_fingerprint(path)}
            for name, path in _files(config).items()
        },
    }


def _name(config: ExplainConfig) -> str:
    files = (config.image, config.reference)
    return "-".join(path.stem for path in files if path is not None)


def folder_of(config: ExplainConfig) -> Path:
    """``output``, or a folder in ``runs/`` named after model and picture."""
    if config.output is not None:
        return config.output
    model = config.model if config.model != FACTORY else str(config.factory).partition(":")[0]
    return Path.cwd() / "runs" / f"explain-{model}-{_name(config)}"


def _patches(
    config: ExplainConfig, made: Attended, reference_mask: Mask | None
) -> tuple[list[GridCell], list[GridCell]]:
    """Patches that get maps: the user's, or some of the filled region and of the reference.

    Raises:
        ConfigError: patches are given, and the reference's tokens have no place.
    """
    from i2am_train.ops.grids import spread_patches
    from i2am_train.reporting.figures.explained import seen_mask
    from i2am_train.types import Direction

    record = made.maps.store.layer(made.layer)
    generated = config.generated_patches or spread_patches(
        _cells(made.mask, record.generated_grid), record.generated_grid
    )
    if Direction.GENERATED_TO_REFERENCE not in made.maps.store.directions:
        _refuse_patches(config)
        return generated, []
    grid = record.grid(Direction.GENERATED_TO_REFERENCE)
    seen = None if reference_mask is None else seen_mask(reference_mask, made.maps)
    return generated, config.reference_patches or spread_patches(_cells(seen, grid), grid)


def _refuse_patches(config: ExplainConfig) -> None:
    """Refuses to pass over patches whose maps do not exist."""
    for name in ("generated_patches", "reference_patches"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}= asks for maps between patches, and this model's reference tokens have no "
                "place in the reference picture. Leave it out."
            )


def _cells(mask: Mask | None, grid: GridSize) -> torch.Tensor:
    """Cells of a grid inside a mask; none where there is no mask."""
    import torch

    from i2am_train.ops.grids import mask_on_grid

    if mask is None:
        return torch.zeros(grid.tokens, dtype=torch.bool)
    return mask_on_grid(torch.from_numpy(mask)[None], grid)[0]


def _title(config: ExplainConfig, recipe: str) -> str:
    """How captions call the model: as the support table does, or by the factory."""
    from i2am_train.attention.known import known_models

    titles = {known.name: known.title for known in known_models()}
    return titles.get(recipe) or recipe or str(config.factory)


def _page(config: ExplainConfig, explained: ExplainedPicture) -> dict[str, Any]:
    """The numbers of the page."""
    import torch

    from i2am_train.reporting.explorer import Explanation, Explored, explorer_data
    from i2am_train.reporting.figures.explained import seen_mask, seen_picture

    maps, mask, on_reference = explained.maps, explained.generated_mask, explained.reference_mask
    region = None if mask is None else torch.from_numpy(mask)
    sample = Explored(
        heading=explained.name,
        name=explained.name,
        about=", ".join(f"{name} {path.name}" for name, path in _files(config).items()),
        reference=seen_picture(explained.reference, maps),
        generated_mask=region,
        reference_mask=None
        if on_reference is None
        else torch.from_numpy(seen_mask(on_reference, maps)),
        region=torch.ones(explained.size, dtype=torch.bool) if region is None else region,
    )
    explanation = Explanation(generated=explained.generated, maps=maps)
    return explorer_data([sample], {explained.model: [explanation]}, config.attribution)


def _files(config: ExplainConfig) -> dict[str, Path]:
    return {name: path for name in FILES if (path := getattr(config, name)) is not None}


def _making(
    config: ExplainConfig, explained: ExplainedPicture, manifest: dict[str, Any]
) -> dict[str, str]:
    """What the page says of its origin."""
    from i2am_train.config.build import plain
    from i2am_train.reporting.provenance import flat, provenance_rows

    return {
        **dict(provenance_rows(manifest)),
        "Model": f"{explained.model}, recipe {explained.maps.store.recipe or 'of the factory'}",
        "Checkpoint": str(config.checkpoint or config.factory),
        "Sampling": flat(plain(config.sampling)),
        "Attribution": flat(plain(config.attribution)),
    }
