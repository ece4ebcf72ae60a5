"""``i2am data make``: the embedded dataset. ``derive``: what a dataset lacks. ``match``: where worn pixels lie
on the flat garment. ``check``: what is wrong with it.

``cache``: what the frozen networks make of it, for training without them.
"""

from __future__ import annotations

from shlex import quote

from i2am_train.config.data import (
    DataCacheConfig,
    DataCheckConfig,
    DataConfig,
    DataDeriveConfig,
    DataMakeConfig,
    DataMatchConfig,
    data_words,
)
from i2am_train.config.locations import dataset_folder, revisions
from i2am_train.data.cache import CacheLayout
from i2am_train.data.dataset import Reading, list_length
from i2am_train.data.dataset_report import check_dataset
from i2am_train.data.derivation import derive_dataset, split_lists
from i2am_train.data.match_dataset import match_dataset, parts_to_match
from i2am_train.data.synthetic import make_dataset
from i2am_train.entry import FAILED_CHECK
from i2am_train.errors import ConfigError
from i2am_train.files import require_own_json, write_json, write_text
from i2am_train.fingerprints import DERIVED_REPORT, MATCHED_REPORT, is_of_dataset
from i2am_train.locks import locked
from i2am_train.models.annotators import HumanParser, ViTPoseEstimator
from i2am_train.models.by_name import model_folder
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import chosen_device
from i2am_train.runs import require_apart
from i2am_train.training.encode_dataset import make_cache
from i2am_train.types import Pairing


def make(config: DataMakeConfig) -> None:
    """Make the synthetic dataset that the options describe."""
    root = config.root or dataset_folder(config.size, config.train, config.test, config.seed)
    if config.root is None and config.annotations:
        raise ConfigError(
            "annotations=true makes a dataset that `i2am train` does not look for by itself. "
            "Add root=FOLDER, and give it as data.root later."
        )
    make_dataset(
        root,
        config.train,
        config.test,
        config.size,
        config.seed,
        annotations=config.annotations,
        workers=config.workers,
        progress=True,
    )
    print(f"{config.train} training and {config.test} held-out samples of {config.size} in {root}")


def check(config: DataCheckConfig) -> int:
    """Print the report on a dataset folder; status 1 if training would fail."""
    if config.json is not None:
        require_apart(config.root, config.json)
        require_own_json(config.json, ("root", "ok", "findings"))
    reading = Reading(config.layout, tuple(config.categories), options="")
    report = check_dataset(config.root, config.size, reading=reading)
    print(report.table())
    if config.json is not None:
        write_text(config.json, report.to_json())
    return 0 if report.ok else FAILED_CHECK


def derive(config: DataDeriveConfig) -> int:
    """Make masks and agnostic pictures; status 1 if a picture was refused."""
    file = config.json or config.root / DERIVED_REPORT
    require_apart(config.root, file, counts=is_of_dataset)  # its report lies beside the pictures
    require_own_json(file, ("root", "made", "refused"))
    for layout in split_lists(config):
        layout.pairs(Pairing.PAIRED)  # bad lists are refused before models are loaded
    parser = estimator = None
    if config.parser is not None:
        parser = HumanParser.from_pretrained(config.parser, config.device)
    if config.estimator is not None:
        estimator = ViTPoseEstimator.from_pretrained(config.estimator, config.device)
    with locked(config.root):
        report = derive_dataset(config, parser, estimator)
        write_json(file, report.to_dict() | revisions(config.parser, config.estimator))
    print(f"{report.summary()}\nReport: {file}")
    return FAILED_CHECK if report.refused else 0


def match(config: DataMatchConfig) -> int:
    """Make the correspondence of a dataset that has none; status 1 if a sample was refused."""
    require_own_json(config.root / MATCHED_REPORT, ("root", "method", "samples"))
    parts_to_match(config)
    with locked(config.root):
        report = match_dataset(config)
    print(f"{report.summary()}\nReport and mark: {config.root / MATCHED_REPORT}")
    return FAILED_CHECK if report.refused else 0


def cache(config: DataCacheConfig) -> None:
    """Encode the dataset, or the rest of it."""
    device = chosen_device(config.device)
    layout = CacheLayout(
        dtype=config.dtype, variants=config.variants, seed=config.seed, shard_samples=config.shard_samples
    )
    require_apart(config.root, config.output)
    reading = Reading(config.layout, tuple(config.categories), config.fit, options="")
    for split in config.splits:
        list_length(config.root, split, Pairing.PAIRED, reading)  # before a model is loaded
    model = TryOnModel.from_pretrained(model_folder(config.init)).to(device)
    with locked(config.output):
        index = make_cache(
            model,
            config.root,
            config.output,
            layout,
            reading=reading,
            splits=config.splits,
            batch_size=config.batch_size,
            workers=config.workers,
            progress=config.progress_bar,
        )
    height, width = model.image_size
    read = DataConfig(
        root=config.root, layout=config.layout, categories=config.categories, fit=config.fit, height=height, width=width
    )
    shards = [shard for made in index.shards.values() for shard in made]
    counts = " and ".join(f"{total} {split}" for split, total in index.samples.items())
    print(
        f"{counts} samples in {len(shards)} shards, {sum(s.bytes for s in shards) / 2**20:.1f} MiB, in "
        f"{config.output}\nTrain from it with: i2am train{data_words(read)} {quote(f'init={config.init}')} "
        f"{quote(f'data.cache={config.output}')}" + (" data.augment=true" if config.variants else "")
    )
