"""From the name in ``init`` or ``checkpoint`` to a try-on model."""

from pathlib import Path

from i2am_train.config.data import DataConfig
from i2am_train.config.locations import checkpoint_folder
from i2am_train.errors import CheckpointError
from i2am_train.models.pretrained import INDEX_FILE
from i2am_train.models.tryon import TryOnModel
from i2am_train.runs import MODEL_FOLDER, SETTINGS_FILE


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
