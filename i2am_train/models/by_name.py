"""Our models by their name in an option: folder, model, and the layer that is repaired and judged where none is set."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from i2am_train.attention.recipe import LayerId, paper_number
from i2am_train.config.data import DataConfig
from i2am_train.config.evaluation import JUDGED, DiagnoseConfig, EvaluateConfig
from i2am_train.config.explanation import TRYON, ExplainConfig, FaithfulConfig
from i2am_train.config.locations import checkpoint_folder
from i2am_train.config.training import AblateConfig, TrainConfig
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.models.pretrained import INDEX_FILE
from i2am_train.models.tryon import PAPER_LAYER, TryOnModel, read_index
from i2am_train.ops.numerics import chosen_device, chosen_precision
from i2am_train.runs import MODEL_FOLDER, SETTINGS_FILE

_Judging = TypeVar("_Judging", bound=TrainConfig | AblateConfig | EvaluateConfig | ExplainConfig | FaithfulConfig)
_Sampling = TypeVar("_Sampling", bound=AblateConfig | EvaluateConfig | ExplainConfig | FaithfulConfig | DiagnoseConfig)


def model_folder(name: str) -> Path:
    """The model's folder that ``init`` or ``checkpoint`` means: shipped, a model's own, or a finished run's."""
    folder = checkpoint_folder(name)
    inside = folder / MODEL_FOLDER
    if not (folder / INDEX_FILE).is_file() and (folder / SETTINGS_FILE).is_file():
        if not (inside / INDEX_FILE).is_file():
            raise CheckpointError(
                f"The run in {folder} is not finished: it has no {MODEL_FOLDER}/. "
                "Give its training command again to finish it."
            )
        return inside
    return folder


def load_model(name: str, data: DataConfig) -> TryOnModel:
    """The checkpoint's model, checked to be of the images' size."""
    folder = model_folder(name)
    model = TryOnModel.from_pretrained(folder)
    if model.image_size != data.size:
        raise CheckpointError(
            f"The model in {folder} was made for images of {model.image_size}, and the data is set to "
            f"{data.size}. Set data.height={model.image_size.height} data.width={model.image_size.width}, "
            "or choose another checkpoint."
        )
    return model


def by_number(layer: LayerId) -> LayerId:
    """A layer by the paper's number where it has one, so that it is recorded in one way.

    >>> by_number("up_blocks.1.attentions.1"), by_number(5), by_number("mid_block.attentions.0")
    (2, 5, 'mid_block.attentions.0')
    """
    return layer if isinstance(layer, int) else paper_number(layer) or layer


def with_layers(config: _Judging) -> _Judging:
    """The options with layers in the place of null, and of the word attribution.layer: what is recorded and compared.

    ``objective.layers`` become the layer of ``init``. ``attribution.layer`` becomes, of a training, the first of the
    trained layers, or the model's own where no term has a weight; of a study, the first of ``objective.layers``, so
    that all arms are judged alike; of our checkpoints, their own; of other people's models, the paper's. Reads the
    model's index alone, and changes nothing that is set.

    Raises:
        CheckpointError: there is no such model, or its index cannot be read.
        ConfigError: the checkpoints of an explanation have different layers, and no option chooses one.

    >>> found = with_layers(TrainConfig(init="tiny"))
    >>> found.objective.layers, found.attribution.layer
    ({'6': 1.0}, 6)
    """
    changes: dict[str, Any] = {}
    if isinstance(config, TrainConfig | AblateConfig):
        judged = _own_layer(config.init)
        objective = config.objective
        if objective.layers is None:
            objective = replace(objective, layers=judged)
        if isinstance(config, AblateConfig) or objective.active:
            judged = by_number(objective.first_layer)
        changes["objective"] = objective
    else:
        judged = _layer_of_checkpoints(config)
    attribution = config.attribution
    if attribution.layer is None:
        attribution = replace(attribution, layer=judged)
    changes["attribution"] = attribution
    if isinstance(config, FaithfulConfig):
        changes["layers"] = _with_judged(config.layers, attribution.judged_layer)
    elif not isinstance(config, ExplainConfig):
        again = config.evaluation.faithfulness
        again = replace(again, layers=_with_judged(again.layers, attribution.judged_layer))
        changes["evaluation"] = replace(config.evaluation, faithfulness=again)
    return replace(config, **changes)


def with_precision(config: _Sampling) -> _Sampling:
    """The options with what the denoiser computes in on this machine in the place of ``sampling.precision=auto``.

    Raises:
        ConfigError: there is no such device, or the card has no bfloat16.

    >>> with_precision(EvaluateConfig(checkpoint="tiny", device="cpu")).sampling.precision
    '32-true'
    """
    precision = chosen_precision(config.sampling.precision, chosen_device(config.device))
    return replace(config, sampling=replace(config.sampling, precision=precision))


def _own_layer(name: str) -> LayerId:
    return by_number(read_index(model_folder(name)).layer)


def _layer_of_checkpoints(config: EvaluateConfig | ExplainConfig | FaithfulConfig) -> LayerId:
    """Where options name none: of our models their own, of others the paper's."""
    if isinstance(config, EvaluateConfig):
        return PAPER_LAYER if config.checkpoint is None else _own_layer(config.checkpoint)
    if config.model != TRYON:
        return PAPER_LAYER
    layers = {name: _own_layer(name) for name in config.checkpoints}
    if config.attribution.layer is None and len(set(layers.values())) > 1:
        found = ", ".join(f"{name} at layer {layer}" for name, layer in layers.items())
        raise ConfigError(
            f"These checkpoints are judged at different layers ({found}), and a page shows all at one. Set "
            "attribution.layer to it."
        )
    return next(iter(layers.values()))


def _with_judged(layers: list[LayerId] | None, judged: LayerId) -> list[LayerId] | None:
    return None if layers is None else [judged if layer == JUDGED else layer for layer in layers]
