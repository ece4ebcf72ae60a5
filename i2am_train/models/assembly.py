"""A try-on model from foreign parts: Stable Diffusion's U-Net and VAE, an image encoder, or the authors' checkpoint.

Each part comes from a folder, a name on the hub, or a single file. Everything that would fail hours later is checked
here: topology, channels, latents, patches, and that every weight was really there.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel

from i2am_train.attention.recipe import PAPER_LAYERS
from i2am_train.config.models import InitConfig
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.models.architecture import make_scheduler, widen_input
from i2am_train.models.pretrained import as_file, load_encoder, load_network
from i2am_train.models.projector import ReferenceProjector
from i2am_train.models.single_file import (
    AUTHORS_NULL_TOKENS,
    AUTHORS_PROJECTOR,
    AUTHORS_UNET,
    AUTHORS_VAE,
    KeyReport,
    Parts,
    Renamed,
    authors_projector,
    authors_unet,
    authors_vae,
    fill,
    is_authors,
    sizes_read,
    unet_from_weights,
    unet_in_our_names,
    vae_from_weights,
    vae_in_our_names,
)
from i2am_train.models.tryon import IMAGENET_MEAN, IMAGENET_STD, INPUT_CHANNELS, TryOnConfig, TryOnModel
from i2am_train.types import GridSize, Normalisation
from i2am_train.weight_files import read_weights

_LATENT_CHANNELS = 4
_SCALING_FACTOR = 0.18215
"""Stable Diffusion's; single files do not state it."""
_DOWNSAMPLING = 8

NORMALISATIONS: dict[Normalisation, tuple[list[float], list[float]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "authors": ([0.5] * 3, [0.5] * 3),
}
"""Mean and standard deviation of the encoder's input in [0, 1]; the authors feed [-1, 1]."""


class _Denoiser(NamedTuple):
    """What was read: U-Net and VAE, the projector where the file has one, and what became of the files' keys."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    projector: ReferenceProjector | None
    reports: list[KeyReport]


def assemble(options: InitConfig) -> tuple[TryOnModel, list[KeyReport]]:
    """The model that the options of ``i2am init`` describe, on the CPU in float32, and what became of its files' keys.

    Raises:
        CheckpointError: a part is missing, damaged, or does not fit the others.
        KeyMismatchError: a single file lacks weights or has them in other shapes.
        ConfigError: image, reference and patch sizes do not go together.
    """
    unet, vae, projector, reports = _read_custom(options) if options.custom else _read_parts(options)
    _check_image_size(options, unet, vae)
    encoder = load_encoder(options.encoder)
    grid, reference_size = reference_geometry(options, encoder)
    if projector is None:
        projector = _new_projector(options, encoder, unet, grid)
        class_token = bool(options.class_token)
    else:
        _check_projector(projector, encoder, unet, options)
        class_token = _class_token_of(projector, grid, options)
    mean, std = NORMALISATIONS[options.normalisation or _usual_normalisation(options, encoder)]
    config = TryOnConfig(
        height=options.height,
        width=options.width,
        reference_height=reference_size.height,
        reference_width=reference_size.width,
        class_token=class_token,
        reference_mean=list(mean),
        reference_std=list(std),
    )
    if unet.config["in_channels"] != INPUT_CHANNELS:
        unet = widen_input(unet)
    model = TryOnModel(config, unet, vae, encoder, projector, make_scheduler(options.prediction_type)).eval()
    # The encoder's tokens must be those of the grid: better found out here than after gigabytes were written.
    with torch.no_grad():
        model.encode_reference(torch.zeros(1, 3, *reference_size))
    return model, reports


# -- U-Net and VAE ------------------------------------------------------------------------------------------------


def _read_parts(options: InitConfig) -> _Denoiser:
    assert options.unet is not None  # the schema's check
    reports: list[KeyReport] = []
    weights: dict[str, Tensor] | None = None
    if file := as_file(options.unet):
        weights = read_weights(file)
        if is_authors(weights):
            raise CheckpointError(
                f"'{file}' is a checkpoint of the authors' custom model, not of Stable Diffusion. Give it as "
                f"custom={file}."
            )
        unet, report = unet_from_weights(weights, file.name, ema=options.ema)
        _check_unet(unet, options.unet)
        reports.append(report)
    elif options.ema:
        raise ConfigError(
            f"ema=true chooses among the weights of a single file, and unet='{options.unet}' is none. Leave it out, or "
            "give the folder of the averaged weights."
        )
    else:
        unet = load_network(UNet2DConditionModel, options.unet, "unet", _check_unet)
    if options.vae is None:
        vae, more = _read_vae(options.unet, _check_own_vae, weights)
    else:
        vae, more = _read_vae(options.vae, _check_vae)
    return _Denoiser(unet, vae, None, reports + more)


def _read_vae(
    source: str, check: Callable[[Any, str], None], weights: Mapping[str, Tensor] | None = None
) -> tuple[AutoencoderKL, list[KeyReport]]:
    """The VAE of a source; ``weights`` are those of its file where they were read already."""
    file = as_file(source)
    if file is None:
        return load_network(AutoencoderKL, source, "vae", check), []
    vae, report = vae_from_weights(weights or read_weights(file), file.name)
    _check_vae(vae, source)
    return vae, [report]


def _read_custom(options: InitConfig) -> _Denoiser:
    """U-Net, projector and null tokens of the authors' checkpoint, and its VAE where no other is given."""
    assert options.custom is not None
    weights, file = read_weights(options.custom), options.custom.name
    if not is_authors(weights):
        raise CheckpointError(
            f"'{file}' is no checkpoint of the authors' custom model: none of its {len(weights)} keys starts with "
            f"{' or '.join(AUTHORS_UNET)}. Give a Stable Diffusion checkpoint as unet=FILE."
        )
    unet, unet_weights = unet_in_our_names(authors_unet(weights), file)
    projector, projector_weights = _empty_projector(authors_projector(weights), file, options.projector_heads)
    parts: Parts = {"unet": (unet, unet_weights), "projector": (projector, projector_weights)}
    ours: tuple[str, ...] = ("diffusion.", "mlp.")
    own_vae: AutoencoderKL | None = None
    if options.vae is None:
        own_vae, vae_weights = vae_in_our_names(authors_vae(weights), file)
        parts = {**parts, "vae": (own_vae, vae_weights)}
        ours += AUTHORS_VAE
    _check_unet(unet, file)
    report = fill(file, weights, parts, ours=ours)
    if own_vae is None:
        assert options.vae is not None
        vae, more = _read_vae(options.vae, _check_vae)
        return _Denoiser(unet, vae, projector, [report, *more])
    _check_vae(own_vae, file)
    return _Denoiser(unet, own_vae, projector, [report])


def _check_unet(unet: UNet2DConditionModel, source: str) -> None:
    """Refuses a U-Net that the try-on model cannot use: other channels or topology, contexts of different widths."""
    channels, out = unet.config["in_channels"], unet.config["out_channels"]
    if channels not in (_LATENT_CHANNELS, INPUT_CHANNELS) or out != _LATENT_CHANNELS:
        raise CheckpointError(
            f"The U-Net of '{source}' has {channels} input and {out} output channels. Expected "
            f"{_LATENT_CHANNELS} (a text-to-image model, which is widened) or {INPUT_CHANNELS} (a try-on model) in, "
            f"{_LATENT_CHANNELS} out. Inpainting models (9) and the authors' later model (17) do not fit; take Stable "
            "Diffusion 1.5."
        )
    layers = {
        name.removesuffix(".transformer_blocks.0.attn2")
        for name, _ in unet.named_modules()
        if name.startswith("up_blocks.") and name.endswith(".attn2")
    }
    if layers != set(PAPER_LAYERS):
        raise CheckpointError(
            f"The U-Net of '{source}' has cross-attention in {len(layers)} decoder layers "
            f"({', '.join(sorted(layers)[:4])}, ...). Expected the nine of Stable Diffusion 1.5, "
            f"{PAPER_LAYERS[0]} to {PAPER_LAYERS[-1]}, with one transformer block each."
        )
    if not isinstance(context := unet.config["cross_attention_dim"], int):
        raise CheckpointError(
            f"The U-Net of '{source}' has contexts of different widths by level ({context}). Expected one width, such "
            "as Stable Diffusion 1.5's 768."
        )


def _check_vae(vae: AutoencoderKL, source: str) -> None:
    """Refuses a VAE whose latents are not those that Stable Diffusion's U-Net was trained on."""
    found = {
        "scaling factor": (vae.config["scaling_factor"], _SCALING_FACTOR),
        "latent channels": (vae.config["latent_channels"], _LATENT_CHANNELS),
        "downsampling": (_downsampling(vae), _DOWNSAMPLING),
    }
    wrong = [f"{name} {is_} (expected {ought})" for name, (is_, ought) in found.items() if is_ != ought]
    if wrong:
        raise CheckpointError(
            f"The VAE of '{source}' has {', '.join(wrong)}, so its latents are not those that the U-Net was trained "
            "on. Give the VAE of Stable Diffusion 1.5, or one fine-tuned from it."
        )
    _check_own_vae(vae, source)


def _check_own_vae(vae: AutoencoderKL, source: str) -> None:
    """What holds also for a VAE that comes in one folder with the U-Net."""
    if vae.config["latent_channels"] != _LATENT_CHANNELS:
        raise CheckpointError(
            f"The VAE of '{source}' has {vae.config['latent_channels']} latent channels. Expected {_LATENT_CHANNELS}."
        )
    moved = [n for n in ("shift_factor", "latents_mean", "latents_std") if vae.config.get(n) is not None]
    if moved:
        raise CheckpointError(
            f"The VAE of '{source}' shifts its latents ({', '.join(moved)}); Stable Diffusion 1.5's does not. Give "
            "another one."
        )


def _downsampling(vae: AutoencoderKL) -> int:
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def _check_image_size(options: InitConfig, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    step = _downsampling(vae) * 2 ** (len(unet.config["block_out_channels"]) - 1)
    if options.height % step or options.width % step:
        raise ConfigError(
            f"height={options.height} width={options.width} is not possible: VAE and U-Net halve the picture "
            f"{step.bit_length() - 1} times, so both must be multiples of {step}. The paper's are 512 and 384."
        )


# -- encoder and projector ----------------------------------------------------------------------------------------


def reference_geometry(options: InitConfig, encoder: PreTrainedModel) -> tuple[GridSize, GridSize]:
    """Patch grid and size in pixels of the reference: as set, or the smallest that covers the image in whole patches.

    Raises:
        ConfigError: the patch does not divide the size that was set.

    >>> from pathlib import Path
    >>> from types import SimpleNamespace
    >>> dinov2 = SimpleNamespace(config=SimpleNamespace(patch_size=14))
    >>> options = InitConfig(unet="sd15", output=Path("start"), height=512, width=384)
    >>> print(*reference_geometry(options, dinov2))  # the paper's patches and pixels
    37x28 518x392
    """
    patch = encoder.config.patch_size
    height = options.reference_height or -(-options.height // patch) * patch
    width = options.reference_width or -(-options.width // patch) * patch
    if height % patch or width % patch:
        raise ConfigError(
            f"reference_height={height} reference_width={width} is not possible: '{options.encoder}' has patches of "
            f"{patch} pixels, which must divide both. The nearest size above is {-(-height // patch) * patch}x"
            f"{-(-width // patch) * patch}."
        )
    return GridSize(height // patch, width // patch), GridSize(height, width)


def _usual_normalisation(options: InitConfig, encoder: PreTrainedModel) -> Normalisation:
    """What the encoder was trained with, or fed with in the authors' training."""
    if options.custom:
        return "authors"
    kind = encoder.config.model_type
    return "clip" if kind.startswith("clip") else "authors" if kind.startswith("siglip") else "imagenet"


def _new_projector(
    options: InitConfig, encoder: PreTrainedModel, unet: UNet2DConditionModel, grid: GridSize
) -> ReferenceProjector:
    width = encoder.config.hidden_size
    if width % options.projector_heads:
        raise ConfigError(
            f"projector_heads={options.projector_heads} does not divide the encoder's width {width}. Set another "
            "number; the authors have 1."
        )
    torch.manual_seed(options.seed)  # here: reading parts may draw numbers, or not
    projector: ReferenceProjector = ReferenceProjector(
        encoder_width=width,
        context_width=unet.config["cross_attention_dim"],
        tokens=grid.tokens + int(bool(options.class_token)),
        depth=options.projector_blocks,
        heads=options.projector_heads,
    )
    return projector


def _empty_projector(theirs: Renamed, file: str, heads: int) -> tuple[ReferenceProjector, Renamed]:
    """A projector on the meta device with the sizes of the tensors for it, and these."""
    with sizes_read(
        f"'{file}' has no projector as in VITON-v1",
        f"the keys {AUTHORS_PROJECTOR}0, 1.blocks and 2, and {AUTHORS_NULL_TOKENS}.",
    ):
        sizes = {
            "encoder_width": theirs.tensors["norm.weight"].shape[0],
            "context_width": theirs.tensors["output.weight"].shape[0],
            "tokens": theirs.tensors["null_tokens"].shape[1],
        }
    depth = len({name.split(".")[1] for name in theirs.tensors if name.startswith("blocks.")})
    with torch.device("meta"):
        return ReferenceProjector(**sizes, depth=depth, heads=heads), theirs


def _check_projector(
    projector: ReferenceProjector, encoder: PreTrainedModel, unet: UNet2DConditionModel, options: InitConfig
) -> None:
    width, context = projector.config["encoder_width"], projector.config["context_width"]
    if width != encoder.config.hidden_size:
        raise CheckpointError(
            f"The projector in '{options.custom}' takes tokens of width {width}, and the encoder '{options.encoder}' "
            f"gives {encoder.config.hidden_size}. Give the encoder that it was trained with (width 1536 is DINOv2-g)."
        )
    if context != unet.config["cross_attention_dim"]:
        raise CheckpointError(
            f"The projector in '{options.custom}' gives a context of width {context}, and the U-Net attends to "
            f"{unet.config['cross_attention_dim']}. The file is damaged, or of another model."
        )


def _class_token_of(projector: ReferenceProjector, grid: GridSize, options: InitConfig) -> bool:
    """Whether the null tokens count a class token in front of the patches."""
    tokens = projector.config["tokens"]
    extra = tokens - grid.tokens
    if extra not in (0, 1) or options.class_token not in (None, bool(extra)):
        raise ConfigError(
            f"The checkpoint has {tokens} null tokens; the encoder's grid of {grid} has {grid.tokens} patches, and "
            f"class_token={options.class_token}. Set reference_height and reference_width to what it was trained at "
            "(the authors: 518 and 392 for 1036 patches and a class token), and leave class_token out."
        )
    return bool(extra)
