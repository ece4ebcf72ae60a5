"""``i2am explain``: every attribution map of a sample, as pictures, as an archive and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am_train.commands.entry import entry
from i2am_train.config.schema import ExplainConfig

if TYPE_CHECKING:
    from i2am_train.attribution.maps import HeatMap
    from i2am_train.datasets.sample import TryOnBatch, TryOnSample
    from i2am_train.evaluation.evaluator import Explained
    from i2am_train.models.tryon import TryOnModel
    from i2am_train.types import GridSize

PATCHES_SHOWN = 6
"""Specific patches that are drawn when the user names none."""


PAGE = "explorer.html"


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One checkpoint on one sample, as a batch of one."""

    folder: str
    """Where its files go, inside the run folder."""
    batch: TryOnBatch
    explained: Explained


def run(config: ExplainConfig) -> None:
    """Explain the samples and say where pictures and page lie."""
    folder = explain(config)
    pictures = len(list(folder.rglob("*.png")))
    size = (folder / PAGE).stat().st_size / 10**6
    print(f"{pictures} pictures, scores, maps and {PAGE} ({size:.1f} MB) in {folder}")


def explain(config: ExplainConfig) -> Path:
    """Sample each image once, write all its maps and the page of them, and return the folder.

    Raises:
        I2AMError: device, checkpoint, data, sample, layer or patch do not fit; nothing is written then.
    """
    from i2am_train.assembly import check_device, load_model, prepare_data
    from i2am_train.config.build import plain
    from i2am_train.reporting.explorer import explorer_page
    from i2am_train.runs import RunFolder, fingerprint, write_text

    check_device(config.device)
    names = _labels(config.checkpoints)
    models = {name: load_model(path, config.data) for name, path in names.items()}
    root = prepare_data(config.data)
    samples = _samples(config, root)
    cases = {name: _cases(config, name, model, samples) for name, model in models.items()}
    flat = [case for made in cases.values() for case in made]
    pictures = [_pictures(config, case.explained, case.batch) for case in flat]
    data = _page_data(config, samples, cases)
    folder = RunFolder.open(_folder(config), plain(config), may_differ=("output", "device"))
    folder.start(seed=config.sampling.seed, data=fingerprint(root))
    for case, figures in zip(flat, pictures, strict=True):
        _write_case(config, folder / case.folder, case, figures)
    page = explorer_page(data, _making(config, folder.manifest))
    write_text(folder / PAGE, page)
    folder.finish()
    return folder.path


def _labels(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by the last part of their path, or by all of it where that is not unique."""
    short = [Path(checkpoint).name for checkpoint in checkpoints]
    unique = len(set(short)) == len(short)
    return dict(zip(short if unique else checkpoints, checkpoints, strict=True))


def _folder(config: ExplainConfig) -> Path:
    if config.output is not None:
        return config.output
    checkpoints = "+".join(Path(checkpoint).name for checkpoint in config.checkpoints)
    samples = "+".join(map(str, config.samples))
    name = f"explain-{checkpoints}-{config.split}{samples}-{config.pairing}"
    return Path.cwd() / "runs" / name


def _cases(
    config: ExplainConfig, name: str, model: TryOnModel, samples: list[TryOnSample]
) -> list[_Case]:
    """One model's images and attention, sample by sample."""
    from torch.utils.data import default_collate

    from i2am_train.evaluation.evaluator import generate_with_attention

    model = model.eval().to(_device(config.device))
    alone = len(config.checkpoints) == len(samples) == 1
    cases = []
    for sample in samples:
        batch = _on_device(default_collate([sample]), model.device)
        folder = "" if alone else f"{name.replace('/', '_')}-{config.split}{sample['index']}"
        explained = generate_with_attention(
            model, batch, config.sampling, config.attribution, all_matrices=True
        )
        cases.append(_Case(folder=folder, batch=batch, explained=explained))
    return cases


def _write_case(config: ExplainConfig, folder: Path, case: _Case, figures: dict[str, Any]) -> None:
    """Pictures, archive and scores of one explanation."""
    from i2am_train.attribution.archive import save_maps
    from i2am_train.evaluation.evaluator import attention_scores
    from i2am_train.runs import write_json

    explained, batch = case.explained, case.batch
    for name, figure in figures.items():
        _save(figure, folder / f"{name}.png")
    save_maps(explained.maps, folder / "maps.safetensors", batch["name"])
    scores = attention_scores(explained, batch, config.attribution)
    values = {name: float(value[0]) for name, value in scores.items()}
    sample = {"name": batch["name"][0], "garment_name": batch["garment_name"][0]}
    write_json(folder / "scores.json", sample | {"layer": explained.layer, "scores": values})


def _page_data(
    config: ExplainConfig, samples: list[TryOnSample], cases: dict[str, list[_Case]]
) -> dict[str, Any]:
    from i2am_train.reporting.explorer import Explanation, explorer_data

    models = {
        name: [
            Explanation(
                generated=_images(case.explained, case.batch)["generated"],
                maps=case.explained.maps,
            )
            for case in made
        ]
        for name, made in cases.items()
    }
    return explorer_data(samples, models, config.attribution)


def _making(config: ExplainConfig, manifest: dict[str, Any]) -> dict[str, str]:
    """What the page says of its origin."""
    from i2am_train.config.build import plain
    from i2am_train.reporting.pages import flat, provenance_rows

    return {
        **dict(provenance_rows(manifest)),
        "Checkpoints": ", ".join(config.checkpoints),
        "Sampling": flat(plain(config.sampling)),
        "Attribution": flat(plain(config.attribution)),
    }


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _samples(config: ExplainConfig, root: Path) -> list[TryOnSample]:
    """The chosen samples."""
    from i2am_train.datasets.viton_hd import VitonHDDataset
    from i2am_train.errors import DataError

    dataset = VitonHDDataset(root, config.split, config.pairing, config.data.size)
    for index in config.samples:
        if index >= len(dataset):
            raise DataError(
                f"sample={index} is out of range: the {config.split} split of {root} has "
                f"{len(dataset)} samples, numbered from 0 to {len(dataset) - 1}."
            )
    return [dataset[index] for index in config.samples]


def _on_device(batch: Any, device: Any) -> TryOnBatch:
    import torch

    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }  # type: ignore[return-value]


def _pictures(config: ExplainConfig, explained: Explained, batch: TryOnBatch) -> dict[str, Any]:
    """All figures by file name."""
    return (
        {"unified": _unified_figure(config, explained, batch)}
        | _level_figures(config, explained, batch)
        | _patch_figures(config, explained, batch)
        | {"centers": _center_figure(explained, batch)}
    )


def _images(explained: Explained, batch: TryOnBatch) -> dict[str, Any]:
    from i2am_train.ops.images import to_uint8

    images = {name: to_uint8(batch[name])[0] for name in ("garment", "agnostic", "person")}
    images["generated"] = to_uint8(explained.generated)[0]
    return {name: image.permute(1, 2, 0).cpu().numpy() for name, image in images.items()}


def _unified_figure(config: ExplainConfig, explained: Explained, batch: TryOnBatch) -> Any:
    """Both directions, whole and above the threshold, beside DAAM's direction, which is constant (paper A.7)."""
    from i2am_train.attribution.maps import threshold
    from i2am_train.reporting.figures import map_grid
    from i2am_train.types import Direction

    images, delta = _images(explained, batch), config.attribution.delta
    generated, reference = explained.map_generated[0].cpu(), explained.map_reference[0].cpu()
    daam = explained.maps.unified(Direction.REFERENCE_TO_GENERATED, softmax_over="reference")
    maps = [
        generated,
        threshold(generated, delta),
        reference,
        threshold(reference, delta),
        daam.normalised().values[0].cpu(),
    ]
    titles = [
        "reference to\ngenerated",
        f"above {delta:g}",
        "generated to\nreference",
        f"above {delta:g}",
        "DAAM's direction\n(constant)",
    ]
    underlay = [
        images[name] for name in ("generated", "generated", "garment", "garment", "generated")
    ]
    return map_grid([map_.numpy() for map_ in maps], titles, underlay, title="Unified maps")


def _level_figures(
    config: ExplainConfig, explained: Explained, batch: TryOnBatch
) -> dict[str, Any]:
    """Layer-, time- and head-level maps and time x resolution, in both directions."""
    from i2am_train.types import Direction

    maps, images = explained.maps, _images(explained, batch)
    weighting, groups = config.attribution.weighting, config.attribution.time_groups
    figures = {}
    for direction, short, picture in (
        (Direction.REFERENCE_TO_GENERATED, "generated", images["generated"]),
        (Direction.GENERATED_TO_REFERENCE, "reference", images["garment"]),
    ):
        figures[f"layers_{short}"] = _grid(
            maps.layer_level(direction), picture, f"Layer-level maps, {short} side", columns=3
        )
        figures[f"time_{short}"] = _grid(
            maps.time_level(direction, groups, weighting),
            picture,
            f"Time-level maps, {short} side (group 0 is the noisiest)",
        )
        figures[f"time_resolution_{short}"] = _grid(
            maps.two_axis(direction, "time", "resolution", groups=groups, weighting=weighting),
            picture,
            f"Time (rows) x resolution (columns), {short} side",
        )
        for heads, part in maps.by_head_count().items():
            figures[f"heads{heads}_{short}"] = _grid(
                part.head_level(direction, weighting),
                picture,
                f"Head-level maps of the layers with {heads} heads, {short} side",
                columns=4,
            )
    return figures


def _grid(heat_map: HeatMap, picture: Any, title: str, columns: int | None = None) -> Any:
    """A figure of all maps of the one sample, each scaled by itself."""
    from i2am_train.attribution.sites import paper_number
    from i2am_train.reporting.figures import map_grid

    values = heat_map.normalised().values[0].cpu()
    labels = [
        [f"layer {paper_number(label)}" if paper_number(label) else label for label in axis]
        for axis in heat_map.labels
    ]
    if values.ndim == 4:
        rows = [f"{heat_map.axes[0]} {label}" for label in labels[0]]
        flat = list(values.flatten(0, 1).numpy())
        return map_grid(
            flat, labels[1], picture, columns=len(labels[1]), row_titles=rows, title=title,
            shared_scale=False,
        )  # fmt: skip
    titles = [
        label if label.startswith("layer") else f"{heat_map.axes[0]} {label}" for label in labels[0]
    ]
    return map_grid(
        list(values.numpy()), titles, picture, columns=columns, title=title, shared_scale=False
    )


def _patch_figures(
    config: ExplainConfig, explained: Explained, batch: TryOnBatch
) -> dict[str, Any]:
    """Specific-reference maps (where a generated patch looks) and reverse ones (what a garment patch feeds)."""
    from i2am_train.evaluation.evaluator import garment_patches
    from i2am_train.ops.masks import mask_on_grid

    images, layer = _images(explained, batch), explained.layer
    generated = config.generated_patches or _spread(
        garment_patches(explained, batch)[0], explained.generated_grid
    )
    reference = config.reference_patches or _spread(
        mask_on_grid(batch["garment_mask"], explained.reference_grid)[0], explained.reference_grid
    )
    looks = explained.maps.specific_reference(generated, layer)
    feeds = explained.maps.reverse_specific_reference(reference, layer)
    return {
        "specific_reference": _grid_of_patches(
            looks, images["garment"], generated, f"Where generated patches look (layer {layer})"
        ),
        "reverse_specific_reference": _grid_of_patches(
            feeds, images["generated"], reference, f"What garment patches feed (layer {layer})"
        ),
    }


def _grid_of_patches(heat_map: HeatMap, picture: Any, patches: Any, title: str) -> Any:
    from i2am_train.reporting.figures import map_grid

    titles = [f"patch ({y}, {x})" for y, x in patches]
    maps = list(heat_map.normalised().values[0].cpu().numpy())
    return map_grid(maps, titles, picture, title=title, shared_scale=False)


def _spread(mask: Any, grid: GridSize) -> list[tuple[int, int]]:
    """A few cells spread evenly over the masked ones; over all of them if the mask is empty."""
    cells = mask.flatten().nonzero().flatten().tolist() or list(range(grid.tokens))
    count = min(PATCHES_SHOWN, len(cells))
    chosen = [cells[(2 * index + 1) * len(cells) // (2 * count)] for index in range(count)]
    return [divmod(cell, grid.width) for cell in chosen]


def _center_figure(explained: Explained, batch: TryOnBatch) -> Any:
    """The sample beside the field of its attention centres."""
    from i2am_train.evaluation.evaluator import make_panels
    from i2am_train.evaluation.results import stack_panels
    from i2am_train.reporting.sample_panel import sample_panel

    panels = stack_panels(make_panels(explained, batch, {int(batch["index"][0])}))
    return sample_panel({"model": panels}, labels={"model": "generated"})


def _save(figure: Any, path: Path) -> None:
    from i2am_train.reporting.canvas import save_figure

    save_figure(figure, path)


if __name__ == "__main__":
    entry("explain", run)
