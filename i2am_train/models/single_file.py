"""Networks from one file in another layout than ours, and what becomes of every key: nothing is lost or made up.

Stable Diffusion's layout is that of ``v1-5-pruned.ckpt`` and of fine-tuned VAEs: ``model.diffusion_model...`` and
``first_stage_model.encoder...``, or ``encoder...`` alone. Names are translated by diffusers' own converters, without
network or the layout's YAML; widths are read off the tensors; a file of another topology is refused.

The authors' custom model (VITON-v1) is a Lightning checkpoint with ``diffusion`` (time embedding, U-Net, output layer,
null tokens), ``mlp`` (our projector), ``encoder`` and ``decoder`` (VAE, as numbered layers) and ``dinov2`` (frozen).
It is put into the names of Stable Diffusion's code, so that one converter serves both: ``encoders.N`` is
``input_blocks.N``, ``bottleneck`` is ``middle_block``, ``decoders.N`` is ``output_blocks.N``.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn

from i2am_train.errors import CheckpointError
from i2am_train.weight_files import check_used

_SHOWN = 5
"""Names of each kind in an error; the report has all of them."""


class KeyMismatchError(CheckpointError):
    """Weights are missing or have other shapes; ``report`` has all of them."""

    def __init__(self, message: str, report: "KeyReport") -> None:
        super().__init__(message)
        self.report = report


class Renamed(NamedTuple):
    """Tensors of a file under other names, at last those of a network of ours."""

    tensors: dict[str, Tensor]
    sources: dict[str, str]
    """Key in the file of each name; one key may serve several names (a fused projection)."""


Parts = Mapping[str, tuple[nn.Module, Renamed]]
"""By name, each network (its weights may be on the meta device) and the tensors for it."""


def renamed(
    weights: Mapping[str, Tensor], prefixes: tuple[str, ...], fused: str, name: Callable[[str], str | None]
) -> Renamed:
    """The tensors whose keys start with ``prefixes``, under the names that ``name`` gives, or under their keys.

    Those with ``fused`` in their keys are query, key and value in that order, and become ``to_q``, ``to_k``, ``to_v``.

    >>> renamed({"a.qkv.bias": torch.arange(3), "b": torch.ones(1)}, ("a.",), "qkv", str.upper).tensors
    {'A.TO_Q.BIAS': tensor([0]), 'A.TO_K.BIAS': tensor([1]), 'A.TO_V.BIAS': tensor([2])}
    """
    found = Renamed({}, {})
    for key, tensor in weights.items():
        if not key.startswith(prefixes):
            continue
        parts = {key: tensor}
        if f".{fused}." in key and not len(tensor) % 3:
            names = (key.replace(fused, f"to_{letter}") for letter in "qkv")
            parts = dict(zip(names, tensor.chunk(3), strict=True))
        for single, part in parts.items():
            ours = name(single) or key
            found.tensors[ours] = part
            found.sources[ours] = key
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """Every key of a file, and every weight of the networks that were filled from it.

    Names of weights start with the network's (``unet.conv_in.weight``).
    """

    file: str
    mapped: dict[str, list[str]]
    """Key of the file to the weights that it filled."""
    missing: list[str]
    """Weights that the file has nothing for."""
    wrong_shape: dict[str, str]
    """Key of the file to what was found and what was expected."""
    unexpected: list[str]
    """Keys of the networks in question that have no place in them."""
    left_out: list[str]
    """Keys of other networks in the same file."""

    @property
    def complete(self) -> bool:
        """True if every weight was filled."""
        return not self.missing and not self.wrong_shape

    def summary(self) -> str:
        """One line: how many keys of each kind."""
        counts = (
            f"{len(getattr(self, name))} {name.replace('_', ' ')}"
            for name in ("mapped", "missing", "wrong_shape", "unexpected", "left_out")
        )
        return f"{self.file}: {', '.join(counts)}"


def key_report(file: str, keys: Iterable[str], parts: Parts, *, ours: tuple[str, ...]) -> KeyReport:
    """Compares what a file offers with what networks need.

    Args:
        file: name of the file, for messages.
        keys: all keys of the file.
        parts: the networks and the tensors for them.
        ours: how the keys of these networks start; all others belong to networks that were not asked for.

    >>> given = Renamed({"weight": torch.ones(2, 3)}, {"weight": "fc.w"})
    >>> key_report("a.ckpt", ["fc.w", "fc.x", "vae.w"], {"fc": (nn.Linear(3, 2), given)}, ours=("fc.",)).summary()
    'a.ckpt: 1 mapped, 1 missing, 0 wrong shape, 1 unexpected, 1 left out'
    """
    mapped: dict[str, list[str]] = {}
    missing: list[str] = []
    wrong_shape: dict[str, str] = {}
    unexpected: list[str] = []
    for part, (network, renamed) in parts.items():
        wanted = network.state_dict()
        missing += [f"{part}.{name}" for name in wanted if name not in renamed.tensors]
        for name, tensor in renamed.tensors.items():
            source = renamed.sources[name]
            if name not in wanted:
                unexpected.append(source)
            elif tensor.shape != wanted[name].shape:
                wrong_shape[source] = f"{_shape(tensor)} where {part}.{name} is {_shape(wanted[name])}"
            else:
                mapped.setdefault(source, []).append(f"{part}.{name}")
    rest = [key for key in keys if key not in mapped.keys() | wrong_shape.keys()]
    left_out = [key for key in rest if not key.startswith(ours)]
    return KeyReport(
        file=file,
        mapped=mapped,
        missing=missing,
        wrong_shape=wrong_shape,
        unexpected=sorted({*unexpected, *rest} - {*left_out}),
        left_out=left_out,
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def fill(file: str, keys: Iterable[str], parts: Parts, *, ours: tuple[str, ...]) -> KeyReport:
    """Gives networks on the meta device their weights, as float32 copies; arguments as of :func:`key_report`.

    Raises:
        KeyMismatchError: weights are missing or have other shapes.
        CheckpointError: a tensor of the file holds whole numbers, or values that are no finite numbers.
    """
    report = key_report(file, keys, parts, ours=ours)
    if not report.complete:
        found = [f"{key} is {text}" for key, text in report.wrong_shape.items()]
        found += [f"nothing for {name}" for name in report.missing]
        shown = "; ".join(found[:_SHOWN]) + ("; ..." if len(found) > _SHOWN else "")
        raise KeyMismatchError(
            f"The weights in {report.summary()}. {shown}. Expected every weight of Stable Diffusion 1.5's topology; "
            "the file is of another model, or incomplete.",
            report,
        )
    for network, renamed in parts.values():
        used = {name: renamed.tensors[name] for name in network.state_dict()}
        check_used({renamed.sources[name]: tensor for name, tensor in used.items()}, file)
        weights = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in used.items()}
        network.load_state_dict(weights, assign=True)
        network.eval()
    return report


@contextmanager
def sizes_read(otherwise: str, expected: str) -> Iterator[None]:
    """While sizes are read off tensors by name: says what is not there, or not as it should be.

    Raises:
        CheckpointError: in place of what the table of tensors raises.

    >>> with sizes_read("'a.ckpt' is no VAE", "one."):
    ...     {}["conv_in"]
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: 'a.ckpt' is no VAE: it has no 'conv_in'. Expected one.
    """
    try:
        yield
    except (KeyError, IndexError, ValueError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else f"tensors of other shapes ({error})"
        raise CheckpointError(f"{otherwise}: it has {found}. Expected {expected}") from error


# -- Stable Diffusion's layout --------------------------------------------------------------------------------------

UNET_PREFIX = "model.diffusion_model."
_EMA_PREFIX = "model_ema."
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_HEADS = 8
_LEVELS = 4


class _Name(NamedTuple):
    """A key in place of its tensor: the converters only move values, and look at shapes of attention weights."""

    key: str
    shape: tuple[int, ...] = ()


def unet_from_weights(
    weights: Mapping[str, Tensor], file: str, *, ema: bool = False
) -> tuple[UNet2DConditionModel, KeyReport]:
    """The U-Net in a checkpoint's tensors, as float32; arguments and errors as of :func:`unet_part`, :func:`fill`."""
    part = unet_part(weights, file, ema=ema)
    return part[0], fill(file, weights, {"unet": part}, ours=(_EMA_PREFIX if ema else UNET_PREFIX,))


def vae_from_weights(weights: Mapping[str, Tensor], file: str) -> tuple[AutoencoderKL, KeyReport]:
    """The VAE in a checkpoint's tensors, as float32; errors as of :func:`vae_part` and :func:`fill`.

    Files have no scaling factor; Stable Diffusion's is assumed.
    """
    vae, tensors, starts = vae_part(weights, file)
    return vae, fill(file, weights, {"vae": (vae, tensors)}, ours=starts)


def unet_part(weights: Mapping[str, Tensor], file: str, *, ema: bool = False) -> tuple[UNet2DConditionModel, Renamed]:
    """The U-Net of a file on the meta device, and the tensors for it: trained weights, or with ``ema`` their average.

    Raises:
        CheckpointError: there is no U-Net of Stable Diffusion 1.5's topology, or no average.
    """
    sources = {key.removeprefix(UNET_PREFIX): key for key in weights if key.startswith(UNET_PREFIX)}
    if not sources:
        raise CheckpointError(
            f"'{file}' has no U-Net in Stable Diffusion's layout: none of its {len(weights)} keys starts with "
            f"'{UNET_PREFIX}' (there: {_examples(weights)}). Give v1-5-pruned.safetensors or another file like it, or "
            "a folder in diffusers' layout."
        )
    if ema:  # the original code drops the dots from the averages' keys
        sources = {name: _EMA_PREFIX + "".join(key.split(".")[1:]) for name, key in sources.items()}
        if not any(key in weights for key in sources.values()):
            raise CheckpointError(
                f"'{file}' has no averaged weights (keys '{_EMA_PREFIX}...'), and ema=true asks for them. Set "
                "ema=false, or give the file that has both, such as v1-5-pruned.ckpt."
            )
    return unet_in_our_names(_taken(weights, sources), file)


def vae_part(weights: Mapping[str, Tensor], file: str) -> tuple[AutoencoderKL, Renamed, tuple[str, ...]]:
    """The VAE of a file, of a whole model or alone, on the meta device, the tensors for it, and how its keys start.

    Raises:
        CheckpointError: there is no VAE of Stable Diffusion's topology.
    """
    whole = "first_stage_model."
    alone = f"{whole}decoder.conv_in.weight" not in weights and "decoder.conv_in.weight" in weights
    prefix = "" if alone else whole
    starts = tuple(f"{prefix}{part}" for part in _VAE_PARTS)
    sources = {key.removeprefix(prefix): key for key in weights if key.startswith(starts)}
    if not sources:
        raise CheckpointError(
            f"'{file}' has no VAE in Stable Diffusion's layout: none of its {len(weights)} keys starts with "
            f"'first_stage_model.' or 'decoder.' (there: {_examples(weights)}). Give vae=FOLDER or vae=FILE with one."
        )
    return *vae_in_our_names(_taken(weights, sources), file), starts


def _taken(weights: Mapping[str, Tensor], sources: Mapping[str, str]) -> Renamed:
    there = {name: key for name, key in sources.items() if key in weights}
    return Renamed({name: weights[key] for name, key in there.items()}, there)


def _examples(keys: Iterable[str]) -> str:
    return ", ".join(sorted({".".join(key.split(".")[:2]) for key in keys})[:4])


def unet_in_our_names(theirs: Renamed, file: str) -> tuple[UNet2DConditionModel, Renamed]:
    """A U-Net on the meta device with the widths of ``theirs``, and these tensors under diffusers' names.

    ``theirs`` have Stable Diffusion's names (``input_blocks...``).

    Raises:
        CheckpointError: it is of another topology.
    """
    ldm = theirs.tensors
    with sizes_read(
        f"The U-Net in '{file}' is not of Stable Diffusion 1.5's topology",
        "four levels of two blocks with cross-attention in the upper three, as in v1-5-pruned.ckpt.",
    ):
        widths = [ldm[f"input_blocks.{3 * n + 1}.0.out_layers.3.weight"].shape[0] for n in range(_LEVELS)]
        context = ldm["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        channels = ldm["input_blocks.0.0.weight"].shape[1], ldm["out.2.weight"].shape[0]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=channels[0],
            out_channels=channels[1],
            block_out_channels=widths,
            layers_per_block=2,
            attention_head_dim=_HEADS,  # diffusers' historical name for the number of heads
            cross_attention_dim=context,
        )
    converted = convert_ldm_unet_checkpoint({f"{UNET_PREFIX}{name}": _Name(name) for name in ldm}, unet.config)
    return unet, _converted(theirs, converted)


def vae_in_our_names(theirs: Renamed, file: str) -> tuple[AutoencoderKL, Renamed]:
    """A VAE of Stable Diffusion's topology on the meta device, and its tensors under diffusers' names.

    1x1 convolutions of its attention become linear layers. Arguments and errors as of :func:`unet_in_our_names`.
    """
    ldm = theirs.tensors
    with sizes_read(
        f"The VAE in '{file}' is not of Stable Diffusion's topology",
        "the VAE of v1-5-pruned.ckpt, or one fine-tuned from it.",
    ):
        levels = len({name.split(".")[2] for name in ldm if name.startswith("encoder.down.")})
        widths = [ldm[f"encoder.down.{n}.block.0.conv2.weight"].shape[0] for n in range(levels)]
        latent = ldm["decoder.conv_in.weight"].shape[1]
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=latent,
            sample_size=512,
        )
    renamed = _converted(theirs, convert_ldm_vae_checkpoint({name: _Name(name) for name in ldm}, vae.config))
    for name, tensor in renamed.tensors.items():
        if ".attentions." in name and tensor.ndim == 4:
            renamed.tensors[name] = tensor[:, :, 0, 0]
    return vae, renamed


def _converted(theirs: Renamed, converted: Mapping[str, _Name]) -> Renamed:
    return Renamed(
        {name: theirs.tensors[value.key] for name, value in converted.items()},
        {name: theirs.sources[value.key] for name, value in converted.items()},
    )


# -- the authors' layout --------------------------------------------------------------------------------------------

AUTHORS_UNET = ("diffusion.time_embedding.", "diffusion.unet.", "diffusion.final.")
AUTHORS_NULL_TOKENS = "diffusion.uncond_vector"
AUTHORS_PROJECTOR = "mlp.proj."
AUTHORS_VAE = ("encoder.", "decoder.")

_OUTSIDE_BLOCKS = {
    "diffusion.time_embedding.linear_1.": "time_embed.0.",
    "diffusion.time_embedding.linear_2.": "time_embed.2.",
    "diffusion.final.groupnorm.": "out.0.",
    "diffusion.final.conv.": "out.2.",
}
_BLOCKS = {"encoders": "input_blocks", "bottleneck": "middle_block", "decoders": "output_blocks"}
_TRANSFORMER_LAYERS = {
    "attention_1.to_q": "attn1.to_q",
    "attention_1.to_k": "attn1.to_k",
    "attention_1.to_v": "attn1.to_v",
    "attention_1.out_proj": "attn1.to_out.0",
    "linear_geglu_1": "ff.net.0.proj",
    "linear_geglu_2": "ff.net.2",
}
_PROJECTOR_LAYERS = _TRANSFORMER_LAYERS | {"layernorm_1": "norm1", "layernorm_2": "norm3"}
_CROSS_LAYERS = _TRANSFORMER_LAYERS | {
    "layernorm_1": "norm1",
    "layernorm_2": "norm2",
    "layernorm_3": "norm3",
    "attention_2.q_proj": "attn2.to_q",
    "attention_2.k_proj": "attn2.to_k",
    "attention_2.v_proj": "attn2.to_v",
    "attention_2.out_proj": "attn2.to_out.0",
}
_UNET_LAYERS = {name: f"transformer_blocks.0.{ours}" for name, ours in _CROSS_LAYERS.items()} | {
    "groupnorm_feature": "in_layers.0",
    "conv_feature": "in_layers.2",
    "linear_time": "emb_layers.1",
    "groupnorm_merged": "out_layers.0",
    "conv_merged": "out_layers.3",
    "residual_layer": "skip_connection",
    "groupnorm": "norm",
    "conv_input": "proj_in",
    "conv_output": "proj_out",
    "conv": "conv",  # of an upsampling layer
}
_VAE_LAYERS = {
    "groupnorm_1": "norm1",
    "conv_1": "conv1",
    "groupnorm_2": "norm2",
    "conv_2": "conv2",
    "residual_layer": "nin_shortcut",
    "groupnorm": "norm",
    "attention.to_q": "q",
    "attention.to_k": "k",
    "attention.to_v": "v",
    "attention.out_proj": "proj_out",
}
_VAE_NUMBERS = {
    "encoder": [
        *("conv_in", "down.0.block.0", "down.0.block.1", "down.0.downsample.conv"),
        *("down.1.block.0", "down.1.block.1", "down.1.downsample.conv"),
        *("down.2.block.0", "down.2.block.1", "down.2.downsample.conv"),
        *("down.3.block.0", "down.3.block.1"),
        *("mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "", "conv_out", "quant_conv"),
    ],
    "decoder": [
        *("post_quant_conv", "conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"),
        *("up.3.block.0", "up.3.block.1", "up.3.block.2", "", "up.3.upsample.conv"),
        *("up.2.block.0", "up.2.block.1", "up.2.block.2", "", "up.2.upsample.conv"),
        *("up.1.block.0", "up.1.block.1", "up.1.block.2", "", "up.1.upsample.conv"),
        *("up.0.block.0", "up.0.block.1", "up.0.block.2", "norm_out", "", "conv_out"),
    ],
}
"""What each numbered layer is; layers without weights have no name."""


def is_authors(keys: Iterable[str]) -> bool:
    """True for a checkpoint of the authors' custom model.

    >>> is_authors(["diffusion.unet.encoders.0.0.weight"]), is_authors(["model.diffusion_model.out.2.weight"])
    (True, False)
    """
    return any(key.startswith(AUTHORS_UNET) for key in keys)


def authors_unet(weights: Mapping[str, Tensor]) -> Renamed:
    """The U-Net's tensors under Stable Diffusion's names; what has no such name keeps its own.

    >>> authors_unet({"diffusion.unet.decoders.4.1.attention_2.k_proj.weight": torch.ones(2, 3)}).sources
    {'output_blocks.4.1.transformer_blocks.0.attn2.to_k.weight':
     'diffusion.unet.decoders.4.1.attention_2.k_proj.weight'}
    """
    return renamed(weights, AUTHORS_UNET, "in_proj", _unet_name)


def authors_projector(weights: Mapping[str, Tensor]) -> Renamed:
    """The tensors of ``mlp`` and the null tokens under the names of :class:`ReferenceProjector`.

    >>> list(authors_projector({"mlp.proj.1.blocks.0.layernorm_2.bias": torch.ones(3)}).tensors)
    ['blocks.0.norm3.bias']
    """
    return renamed(weights, (AUTHORS_PROJECTOR, AUTHORS_NULL_TOKENS), "in_proj", _projector_name)


def authors_vae(weights: Mapping[str, Tensor]) -> Renamed:
    """The VAE's tensors under Stable Diffusion's names (``encoder.down.0...``).

    >>> list(authors_vae({"decoder.2.conv_1.weight": torch.ones(1), "decoder.0.bias": torch.ones(1)}).tensors)
    ['decoder.mid.block_1.conv1.weight', 'post_quant_conv.bias']
    """
    return renamed(weights, AUTHORS_VAE, "in_proj", _vae_name)


def _unet_name(key: str) -> str | None:
    for theirs, ours in _OUTSIDE_BLOCKS.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    match = re.fullmatch(r"diffusion\.unet\.((?:en|de)coders\.\d+|bottleneck)\.(\d+)\.(.*)", key)
    if match is None:
        return None
    part = match[1].partition(".")[0]
    block = f"{match[1].replace(part, _BLOCKS[part])}.{match[2]}."
    if match[3] in ("weight", "bias"):  # a bare convolution: the first, or one that halves the size
        return f"{block}{match[3]}" if block == "input_blocks.0.0." else f"{block}op.{match[3]}"
    layer = _layer(match[3], _UNET_LAYERS)
    return layer and block + layer


def _projector_name(key: str) -> str | None:
    if key == AUTHORS_NULL_TOKENS:
        return "null_tokens"
    if match := re.fullmatch(re.escape(AUTHORS_PROJECTOR) + r"1\.blocks\.(\d+)\.(.*)", key):
        layer = _layer(match[2], _PROJECTOR_LAYERS)
        return layer and f"blocks.{match[1]}.{layer}"
    part, _, rest = key.removeprefix(AUTHORS_PROJECTOR).partition(".")
    return f"{'norm' if part == '0' else 'output'}.{rest}" if part in ("0", "2") else None


def _vae_name(key: str) -> str | None:
    half, number, rest = (key.split(".", 2) + ["", ""])[:3]
    names = _VAE_NUMBERS[half]
    if not number.isdigit() or int(number) >= len(names) or not names[int(number)]:
        return None
    part = names[int(number)]
    start = "" if part.endswith("quant_conv") else f"{half}."
    layer = rest if rest in ("weight", "bias") else _layer(rest, _VAE_LAYERS)
    return layer and f"{start}{part}.{layer}"


def _layer(name: str, table: Mapping[str, str]) -> str | None:
    """A layer's name by a table, its ``weight`` or ``bias`` kept."""
    layer, _, kind = name.rpartition(".")
    return f"{table[layer]}.{kind}" if layer in table else None
