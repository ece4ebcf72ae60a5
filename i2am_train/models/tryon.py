"""The try-on model: Stable Diffusion's U-Net and VAE with an image encoder where the text encoder was (paper A.5).

One class for all sizes. The U-Net sees 12 channels [noisy latent, agnostic latent, pose latent] and attends to the
garment's patch tokens; nothing else tells it about the garment. A folder in diffusers' layout holds it::

    model_index.json  unet/  vae/  reference_encoder/  projector/  scheduler/
"""

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from i2am_train.attention.known import diffusers_decoder
from i2am_train.attention.lookup import resolve_root, resolve_sites
from i2am_train.attention.recipe import Recipe, find_layer
from i2am_train.config.options import Count, Layer, Positive, Rule, build
from i2am_train.errors import CaptureError, CheckpointError, ConfigError
from i2am_train.files import free_space
from i2am_train.locks import staged
from i2am_train.models.diffusion import NoiseSchedule
from i2am_train.models.lora import copy_adapters, merged
from i2am_train.models.pretrained import INDEX_FILE, load_encoder, load_network, load_part, reading
from i2am_train.models.projector import ReferenceProjector
from i2am_train.models.watch import Watch
from i2am_train.types import GridSize
from i2am_train.weight_files import check_numbers, read_description

diffusers_logging.disable_progress_bar()  # "Writing model shards" for files of a few megabytes
transformers_logging.disable_progress_bar()

_COMPONENTS = ("unet", "vae", "reference_encoder", "projector", "scheduler")
"""Folders of a model's folder."""
NOISE_SCHEDULE = "noise_schedule"
"""Entry of an exported pipeline's index; the model reads its scheduler instead."""
INPUT_CHANNELS = 12
"""Of the U-Net: the noisy latent, the agnostic latent and the pose latent."""
Images = Float[Tensor, "batch 3 height width"]
Latents = Float[Tensor, "batch 4 latent_height latent_width"]
EncoderTokens = Float[Tensor, "batch encoder_token encoder_width"]
ContextTokens = Float[Tensor, "batch token context"]

PAPER_LAYER = 2
"""The layer that the paper's losses repair (A.5), by its number."""
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


_THREE = Rule("three values, of red, green and blue", lambda values: len(values) == 3)


@dataclass(kw_only=True, slots=True)
class TryOnConfig:
    """What a model needs to know besides its networks.

    ``height`` and ``width`` are those of the images; ``reference_height`` and ``reference_width`` those that the
    garment is resized to for the encoder (518x392 for DINOv2 at 37x28 patches). ``class_token`` keeps the encoder's
    class token in front of the patches. ``reference_mean`` and ``reference_std`` normalise the garment from [0, 1];
    the authors' code feeds [-1, 1], which is mean 0.5 and std 0.5. ``layer``, a number of the paper's or a name, is the
    one whose attention is repaired and judged where options name none; the paper's is 2 (A.5).
    """

    height: Count
    width: Count
    reference_height: Count
    reference_width: Count
    class_token: bool = False
    reference_mean: Annotated[list[float], _THREE] = field(default_factory=lambda: list(IMAGENET_MEAN))
    reference_std: Annotated[list[Positive], _THREE] = field(default_factory=lambda: list(IMAGENET_STD))
    layer: Layer = PAPER_LAYER


class Conditions(NamedTuple):
    """What the denoiser is told besides the noisy latent."""

    agnostic: Latents
    pose: Latents
    tokens: ContextTokens


class Moments(NamedTuple):
    """A diagonal Gaussian over latents, before the VAE's scaling factor."""

    mean: Latents
    std: Latents


class TryOnModel(nn.Module):
    """A latent diffusion model that dresses a person in a reference garment."""

    reference_mean: Tensor
    reference_std: Tensor

    def __init__(
        self,
        config: TryOnConfig,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        reference_encoder: PreTrainedModel,
        projector: ReferenceProjector,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        self.vae = vae
        self.reference_encoder = reference_encoder
        self.projector = projector
        self.schedule = NoiseSchedule(scheduler)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, f"reference_{name}"), device=unet.device)[:, None, None]
            self.register_buffer(f"reference_{name}", values, persistent=False)

    # -- sizes ------------------------------------------------------------------------------------------------

    @property
    def image_size(self) -> GridSize:
        """Size of the images that the model was made for."""
        return GridSize(self.config.height, self.config.width)

    @property
    def latent_size(self) -> GridSize:
        """Size of the latent grid.

        >>> from i2am_train.models.architecture import build_model
        >>> with torch.device("meta"):  # shapes alone
        ...     model = build_model(GridSize(64, 48))
        >>> print(model.image_size, model.latent_size, model.reference_grid)
        64x48 16x12 8x6
        """
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return GridSize(self.config.height // factor, self.config.width // factor)

    @property
    def reference_grid(self) -> GridSize:
        """Grid of the reference's patch tokens."""
        patch = self.reference_encoder.config.patch_size
        return GridSize(self.config.reference_height // patch, self.config.reference_width // patch)

    @property
    def special_tokens(self) -> int:
        """Number of tokens in front of the patches: 1 with the class token, else 0."""
        return int(self.config.class_token)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.reference_mean.device

    def attention_recipe(self) -> Recipe:
        """Where this model's reference attention is: the nine decoder layers of the paper."""
        return diffusers_decoder(self.reference_grid, self.special_tokens, rows="all")

    # -- networks ---------------------------------------------------------------------------------------------

    def encode_latents(self, images: Images, noise: Latents | None = None) -> Latents:
        """Scaled latents of images in [-1, 1]: the posterior's mean, or a sample of it when noise is given."""
        return self.sample_latents(self.encode_moments(images), noise)

    def encode_moments(self, images: Images) -> Moments:
        """The VAE's posterior of images in [-1, 1], unscaled, in the images' number format."""
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return Moments(posterior.mean.to(images.dtype), posterior.std.to(images.dtype))

    def sample_latents(self, moments: Moments, noise: Latents | None = None) -> Latents:
        """Scaled latents of a posterior: its mean, or a sample of it when noise is given."""
        latents = moments.mean if noise is None else moments.mean + moments.std * noise
        scaled: Tensor = latents * self.vae.config["scaling_factor"]
        return scaled

    def decode_latents(self, latents: Latents, names: Sequence[str] | None = None) -> Images:
        """Images in [-1, 1]; ``names`` of the samples are for messages.

        Raises:
            NotFiniteError: the VAE gives NaN or infinity, which clamping would hide.
        """
        images: Tensor = self.vae.decode(latents / self.vae.config["scaling_factor"]).sample
        watch = Watch(names)
        watch.see(images, "The images that the VAE decodes")
        watch.check()
        return images.clamp(-1, 1)

    def encode_reference(self, garment: Images) -> ContextTokens:
        """Context tokens of garments in [-1, 1]: patches in row-major order, after the class token if kept.

        >>> from i2am_train.models.architecture import build_model
        >>> with torch.device("meta"):  # shapes alone
        ...     model = build_model(GridSize(64, 48))
        >>> model.encode_reference(torch.zeros(2, 3, 64, 48, device="meta")).shape  # 8x6 patches
        torch.Size([2, 48, 128])
        """
        return self.project_reference(self.encode_garment(garment))

    def encode_garment(self, garment: Images) -> EncoderTokens:
        """All tokens of the frozen encoder, special ones included, for garments in [-1, 1]."""
        size = (self.config.reference_height, self.config.reference_width)
        if garment.shape[-2:] != size:
            garment = nn.functional.interpolate(garment, size, mode="bilinear", antialias=True, align_corners=False)
        pixels = ((garment + 1) / 2 - self.reference_mean) / self.reference_std
        # CLIP and SigLIP must be told to stretch their positions over another size than they were trained at.
        any_size = "interpolate_pos_encoding"
        taken = inspect.signature(self.reference_encoder.forward).parameters
        options = {any_size: True} if any_size in taken else {}
        pixels = pixels.to(self.reference_encoder.dtype)
        tokens: Tensor = self.reference_encoder(pixel_values=pixels, **options).last_hidden_state
        return tokens.to(garment.dtype)

    def project_reference(self, tokens: EncoderTokens, dropped: Bool[Tensor, " batch"] | None = None) -> ContextTokens:
        """Context tokens from the encoder's: what is trained of the way from garment to U-Net.

        Those of ``dropped`` samples are the null tokens, put in by the projector itself: where its weights are sharded,
        they are together only in its own forward.
        """
        projected: Tensor = self.projector(self._kept_tokens(tokens), dropped)
        return projected

    def _kept_tokens(self, tokens: EncoderTokens) -> EncoderTokens:
        """The patches, after the class token if it is kept; registers are left out.

        Encoders put their special tokens first: none (SigLIP), a class token (CLIP, DINOv2), or a class token and
        registers (DINOv2 with registers, DINOv3).
        """
        grid = self.reference_grid
        special = tokens.shape[1] - grid.tokens
        registers = getattr(self.reference_encoder.config, "num_register_tokens", 0)
        if special not in (0, 1 + registers) or special < self.special_tokens:
            raise CheckpointError(
                f"{type(self.reference_encoder).__name__} gives {tokens.shape[1]} tokens for a garment of "
                f"{self.config.reference_height}x{self.config.reference_width}; expected the {grid.tokens} patches of "
                f"a grid of {grid}{', after a class token' if self.config.class_token else ''}. Set class_token, "
                f"reference_height and reference_width in the model's {INDEX_FILE} to what the encoder gives."
            )
        return torch.cat([tokens[:, : self.special_tokens], tokens[:, special:]], dim=1)

    def denoise(
        self,
        noisy: Latents,
        timesteps: Int[Tensor, " batch"],
        conditions: Conditions,
        call: Callable[..., Tensor] | None = None,
    ) -> Latents:
        """The network's raw prediction (eps or v) in the authors' channel order; ``call`` is what calls it."""
        inputs = torch.cat([noisy, conditions.agnostic, conditions.pose], dim=1)
        if call is not None:
            return call(inputs, timesteps, conditions.tokens)
        prediction: Tensor = self.unet(inputs, timesteps, conditions.tokens).sample
        return prediction

    def forward(
        self,
        noisy: Latents,
        timesteps: Int[Tensor, " batch"],
        agnostic: Latents,
        pose: Latents,
        encoded_garment: EncoderTokens,
        dropped: Bool[Tensor, " batch"],
    ) -> Latents:
        """One training evaluation: everything that is trained runs inside this call, as DDP and FSDP need.

        ``encoded_garment`` is the result of :meth:`encode_garment`, and agnostic and pose are latents.
        """
        tokens = self.project_reference(encoded_garment, dropped)
        return self.denoise(noisy, timesteps, Conditions(agnostic, pose, tokens))

    def redraw_denoiser(self) -> None:
        """Draws the weights of U-Net and projector anew, as for a model that was never trained.

        VAE and reference encoder stay. Uses torch's global random stream.
        """
        self.unet = UNet2DConditionModel.from_config(self.unet.config).to(self.device)
        self.projector = ReferenceProjector.from_config(self.projector.config).to(self.device)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """This model with other values of U-Net and projector, by their names here; they are not copied.

        For models whose own weights are not all in this process. VAE and reference encoder are shared.
        """
        with torch.device("meta"):  # draws no random numbers and needs no memory
            unet = UNet2DConditionModel.from_config(self.unet.config)
            projector = ReferenceProjector.from_config(self.projector.config)
            copy_adapters(self.unet, unet)
        for name, network in (("unet.", unet), ("projector.", projector)):
            values = {key.removeprefix(name): v for key, v in weights.items() if key.startswith(name)}
            network.load_state_dict(values, assign=True)
        scheduler = self.schedule.scheduler
        return type(self)(self.config, unet, self.vae, self.reference_encoder, projector, scheduler)

    def with_encoders(self, dtype: torch.dtype) -> Self:
        """This model with copies of VAE and reference encoder in another number format; the rest is shared."""
        # Not diffusers' own ``to``, which warns where nothing is lost.
        vae, encoder = (nn.Module.to(copy.deepcopy(each), dtype) for each in (self.vae, self.reference_encoder))
        return type(self)(self.config, self.unet, vae, encoder, self.projector, self.schedule.scheduler)

    # -- files ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Writes the model's folder; it appears complete or not at all. Adapters are merged into the U-Net's weights.

        ``half`` stores the weights as float16. Raises ``CheckpointError`` when the folder exists and holds anything but
        such a model, or when the disk has not enough space for it.
        """
        folder = Path(folder).absolute()
        if foreign := _foreign_files(folder):
            raise CheckpointError(
                f"'{folder}' exists and holds something that is not a try-on model ({', '.join(foreign[:5])}). "
                "Nothing was written. Choose another folder."
            )
        needed = sum(value.numel() * value.element_size() for value in self.state_dict().values())
        existing, free = free_space(folder.parent)
        if free < needed:
            raise CheckpointError(
                f"The model needs {needed / 2**30:.1f} GiB in '{existing}', and {free / 2**30:.1f} GiB are free there. "
                "Nothing was written. Make room, or choose a folder on another disk."
            )
        with staged(folder) as content:
            self.write(content, torch.float16 if half else None)

    def write(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes the files of :meth:`save_pretrained` into a new folder; ``dtype`` is another than the weights' own.

        Raises:
            CheckpointError: a value is too large for the type.
        """
        from i2am_train import __version__

        self.schedule.scheduler.save_pretrained(folder / "scheduler")
        merged(self.unet).save_pretrained(folder / "unet")
        for name in ("vae", "reference_encoder", "projector"):
            getattr(self, name).save_pretrained(folder / name)
        for file in folder.rglob("*.safetensors") if dtype is not None else ():
            weights = {name: value.to(dtype) for name, value in load_file(file).items()}
            check_numbers(weights, f"{file.parent.name} in {dtype}".replace("torch.", ""))
            save_file(weights, file, metadata={"format": "pt"})
        index = {"_class_name": "TryOnModel", "_i2am_train_version": __version__}
        (folder / INDEX_FILE).write_text(json.dumps(index | asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads a folder that :meth:`save_pretrained` wrote; weights become float32.

        Raises ``CheckpointError`` when the folder is missing, incomplete, unreadable or of another kind, or when its
        networks do not fit each other.
        """
        folder = Path(folder)
        config = read_index(folder)
        networks = (
            load_network(UNet2DConditionModel, str(folder), "unet"),
            load_network(AutoencoderKL, str(folder), "vae"),
            load_encoder(str(folder / "reference_encoder")),
            load_network(ReferenceProjector, str(folder), "projector"),
            load_part(DDIMScheduler, str(folder), "scheduler"),
        )
        model = reading(str(folder), lambda: cls(config, *networks))
        _check_fit(model, folder)
        return model  # type: ignore[no-any-return]


def _check_fit(model: TryOnModel, folder: Path) -> None:
    """Refuses networks of different models in one folder; torch would fail at the first step, and name no cause."""
    unet, projector = model.unet.config, model.projector.config
    tokens = model.reference_grid.tokens + model.special_tokens
    pairs = {
        "U-Net's input channels": (unet["in_channels"], INPUT_CHANNELS),
        "U-Net's context width": (unet["cross_attention_dim"], projector["context_width"]),
        "U-Net's latent channels": (unet["out_channels"], model.vae.config["latent_channels"]),
        "projector's input width": (projector["encoder_width"], model.reference_encoder.config.hidden_size),
        "projector's null tokens": (projector["tokens"], tokens),
    }
    wrong = [f"{name} {a}, expected {b}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise CheckpointError(
            f"The networks in '{folder}' do not fit each other: {'; '.join(wrong)}. They come from different models, "
            f"or {INDEX_FILE} was changed. Make the model with 'i2am init', which fits foreign networks together."
        )
    recipe = model.attention_recipe()
    try:
        find_layer(model.config.layer, [site.layer for site in resolve_sites(resolve_root(model, recipe), recipe)])
    except CaptureError as error:
        raise CheckpointError(
            f"'{folder / INDEX_FILE}' says layer={model.config.layer}, which is the layer to repair and to judge: "
            f"{error} Set layer in that file to it."
        ) from error


def _foreign_files(folder: Path) -> list[str]:
    """What lies in a folder that :meth:`TryOnModel.save_pretrained` did not write there; of another model, all."""
    if not folder.is_dir():
        return [folder.name] if folder.exists() else []
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        ours = {INDEX_FILE, *_COMPONENTS} if index["_class_name"] == TryOnModel.__name__ else set()
    except (OSError, ValueError, TypeError, KeyError):
        ours = set()
    return sorted({entry.name for entry in folder.iterdir()} - ours)


def read_index(folder: Path) -> TryOnConfig:
    """What the folder's index says; nothing else is opened.

    Raises:
        CheckpointError: the folder lacks the index or a network's folder, or the index is not of a try-on model.
    """
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
        raise CheckpointError(
            f"'{folder}' is no try-on model: it has no {INDEX_FILE} "
            f"({'found: ' + (found or 'nothing') if folder.is_dir() else 'no such folder'}). "
            "Give the folder that save_pretrained or 'i2am train' wrote."
        )
    missing = [name for name in _COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"The model in '{folder}' lacks {', '.join(missing)}; expected {', '.join(_COMPONENTS)}. "
            "The folder may be half copied; copy or export it again."
        )
    index = read_description(index_file)
    others = {*_COMPONENTS, NOISE_SCHEDULE}
    options = {k: v for k, v in index.items() if k not in others and not k.startswith("_")}
    try:
        return build(TryOnConfig, options)
    except ConfigError as error:
        raise CheckpointError(
            f"'{index_file}' is not a try-on model's index: {error} Export the model again."
        ) from error
