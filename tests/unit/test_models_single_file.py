"""The authors' checkpoints: their network, written again here from its description, computes what ours computes."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.config.models import InitConfig
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.models.assembly import assemble
from i2am_train.models.projector import ReferenceProjector
from i2am_train.models.single_file import (
    KeyMismatchError,
    authors_projector,
    authors_unet,
    authors_vae,
    key_report,
    unet_in_our_names,
    vae_in_our_names,
)
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.workflows.models import init as run
from tests.support.ldm_models import AuthorsDiffusion, AuthorsSelfAttention

WIDTHS = (32, 32, 64, 64)
CONTEXT = 24
ENCODER = 32
VAE_WIDTHS = (32, 32, 64, 64)


class ProjectorBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layernorm_1 = nn.LayerNorm(width)
        self.attention_1 = AuthorsSelfAttention(1, width)
        self.layernorm_2 = nn.LayerNorm(width)
        self.linear_geglu_1 = nn.Linear(width, 8 * width)
        self.linear_geglu_2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_1(self.layernorm_1(x))
        value, gate = self.linear_geglu_1(self.layernorm_2(x)).chunk(2, dim=-1)
        return x + self.linear_geglu_2(value * F.gelu(gate))


class ProjectorBlocks(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ProjectorBlock(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TheirProjector(nn.Module):
    def __init__(self, width: int, context: int, depth: int = 3) -> None:
        super().__init__()
        parts = [nn.LayerNorm(width), ProjectorBlocks(width, depth), nn.Linear(width, context)]
        self.proj = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.proj:
            x = part(x)
        return x


class VaeResidual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.groupnorm_1, self.groupnorm_2 = nn.GroupNorm(32, before), nn.GroupNorm(32, after)
        self.conv_1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv_2 = nn.Conv2d(after, after, 3, padding=1)
        self.residual_layer = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_1(F.silu(self.groupnorm_1(x)))
        return self.conv_2(F.silu(self.groupnorm_2(hidden))) + self.residual_layer(x)


class VaeAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.groupnorm = nn.GroupNorm(32, width)
        self.attention = AuthorsSelfAttention(1, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.groupnorm(x).flatten(2).mT).mT.reshape(x.shape) + x


class Halve(nn.Conv2d):
    """Stride 2 with one row and column of zeros below and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def their_encoder(a: int, b: int, c: int, d: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1),
        *(VaeResidual(a, a), VaeResidual(a, a), Halve(a, a, 3, stride=2)),
        *(VaeResidual(a, b), VaeResidual(b, b), Halve(b, b, 3, stride=2)),
        *(VaeResidual(b, c), VaeResidual(c, c), Halve(c, c, 3, stride=2)),
        *(VaeResidual(c, d), VaeResidual(d, d)),
        *(VaeResidual(d, d), VaeAttention(d), VaeResidual(d, d)),
        *(nn.GroupNorm(32, d), nn.SiLU(), nn.Conv2d(d, 8, 3, padding=1), nn.Conv2d(8, 8, 1)),
    )


def their_decoder(a: int, b: int, c: int, d: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(4, 4, 1), nn.Conv2d(4, d, 3, padding=1)),
        *(VaeResidual(d, d), VaeAttention(d), VaeResidual(d, d)),
        *(VaeResidual(d, d), VaeResidual(d, d), VaeResidual(d, d)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(d, d, 3, padding=1)),
        *(VaeResidual(d, c), VaeResidual(c, c), VaeResidual(c, c)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)),
        *(VaeResidual(c, b), VaeResidual(b, b), VaeResidual(b, b)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(b, b, 3, padding=1)),
        *(VaeResidual(b, a), VaeResidual(a, a), VaeResidual(a, a)),
        *(nn.GroupNorm(32, a), nn.SiLU(), nn.Conv2d(a, 3, 3, padding=1)),
    )


class TheirModel(nn.Module):
    """All that their Lightning module holds; the frozen encoder is one tensor."""

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        context: int = CONTEXT,
        encoder: int = ENCODER,
        tokens: int = 51,
        vae: tuple[int, ...] = VAE_WIDTHS,
        channels: int = 12,
    ) -> None:
        super().__init__()
        self.diffusion = AuthorsDiffusion(widths, context, tokens, channels)
        self.mlp = TheirProjector(encoder, context)
        self.dinov2 = nn.Module()
        self.dinov2.model = nn.LayerNorm(encoder)
        self.encoder, self.decoder = their_encoder(*vae), their_decoder(*vae)


def randomised(model: TheirModel) -> TheirModel:
    """Norms at work and outputs that do not vanish; convolutions as torch draws them."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> TheirModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return randomised(TheirModel())


@pytest.fixture(scope="module")
def folder(theirs: TheirModel, make_parts: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their checkpoint as Lightning writes it, and an encoder."""
    root = tmp_path_factory.mktemp("authors")
    torch.save({"epoch": 82, "state_dict": theirs.state_dict(), "lr_schedulers": []}, root / "a.ckpt")
    make_parts("dinov2").save_pretrained(root / "dinov2")
    return root


def options(folder: Path, output: Path, **changes: Any) -> InitConfig:
    given: dict[str, Any] = {
        "custom": folder / "a.ckpt",
        "encoder": str(folder / "dinov2"),
        "output": output,
        "height": 128,
        "width": 64,
    }
    return InitConfig(**given | changes)


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TryOnModel:
    output = tmp_path_factory.mktemp("converted") / "model"
    run(options(folder, output))
    return TryOnModel.from_pretrained(output).eval()


def outputs(model: nn.Module, names: list[str], call: Callable[[], Any]) -> dict[str, Tensor]:
    """What the named submodules give while ``call`` runs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = (output if isinstance(output, Tensor) else output[0]).detach()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    assert found.keys() == set(names)
    return found


def corresponding() -> dict[str, str]:
    """Their modules and ours, layer by layer."""
    pairs = {"encoders.0": "conv_in", "bottleneck.1": "mid_block.attentions.0"}
    pairs |= {f"bottleneck.{2 * n}": f"mid_block.resnets.{n}" for n in (0, 1)}
    for level in range(4):
        for number in range(2):
            block = f"encoders.{3 * level + number + 1}"
            pairs[f"{block}.0"] = f"down_blocks.{level}.resnets.{number}"
            if level < 3:
                pairs[f"{block}.1"] = f"down_blocks.{level}.attentions.{number}"
        if level < 3:
            pairs[f"encoders.{3 * level + 3}"] = f"down_blocks.{level}.downsamplers.0"
    for block in range(4):
        for number in range(3):
            pairs[f"decoders.{3 * block + number}.0"] = f"up_blocks.{block}.resnets.{number}"
            if block > 0:
                pairs[f"decoders.{3 * block + number}.1"] = f"up_blocks.{block}.attentions.{number}"
        if block < 3:
            last = f"decoders.{3 * block + 2}.{1 if block == 0 else 2}"
            pairs[last] = f"up_blocks.{block}.upsamplers.0"
    return pairs


def test_every_block_computes_the_same(theirs: TheirModel, ours: TryOnModel) -> None:
    """All 22 residual blocks, 16 attention blocks, resamplings, and the output, at different times per sample."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(2, 12, 16, 8, generator=generator)
    context = torch.randn(2, 51, CONTEXT, generator=generator)
    step = torch.tensor([17, 930])
    pairs = corresponding()
    assert len(pairs) == 1 + 22 + 16 + 3 + 3
    noisy, agnostic, pose = inputs.split(4, dim=1)
    conditions = Conditions(agnostic, pose, context)
    with torch.no_grad():
        expected = theirs.diffusion(inputs, context, step)
        given = ours.denoise(noisy, step, conditions)
    torch.testing.assert_close(given, expected, atol=2e-4, rtol=1e-3)
    names = [f"unet.{name}" for name in pairs]
    wanted = outputs(theirs.diffusion, names, lambda: theirs.diffusion(inputs, context, step))
    found = outputs(ours.unet, list(pairs.values()), lambda: ours.denoise(noisy, step, conditions))
    for name, mine in pairs.items():
        assert wanted[f"unet.{name}"].std() > 0.1
        torch.testing.assert_close(
            found[mine], wanted[f"unet.{name}"], atol=2e-4, rtol=1e-3, msg=lambda m, n=mine: f"{n}: {m}"
        )


def test_projector_and_null_tokens(theirs: TheirModel, ours: TryOnModel) -> None:
    """Three blocks of one head; the null tokens count the class token."""
    tokens = torch.randn(2, 51, ENCODER)
    with torch.no_grad():
        torch.testing.assert_close(ours.projector(tokens), theirs.mlp(tokens), atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.projector.null_tokens, theirs.diffusion.uncond_vector)
    assert len(ours.projector.blocks) == 3
    assert ours.config.class_token is True
    assert ours.config.reference_mean == ours.config.reference_std == [0.5] * 3


def test_their_vae(theirs: TheirModel, ours: TryOnModel) -> None:
    """Encoder (mean and log-variance) and decoder. Their norms have torch's epsilon, ours a smaller one."""
    vae = deepcopy(ours.vae)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5
    images, latents = torch.randn(2, 3, 32, 16), torch.randn(2, 4, 4, 2)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        mean, logarithm = theirs.encoder(images).chunk(2, dim=1)
        decoded = theirs.decoder(latents)
        torch.testing.assert_close(posterior.mean, mean, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(posterior.logvar, logarithm.clamp(-30, 20), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(vae.decode(latents).sample, decoded, atol=1e-4, rtol=1e-3)
    assert decoded.std() > 0.05


def test_every_key_is_in_the_report(folder: Path, theirs: TheirModel, tmp_path: Path) -> None:
    """Exactly once, the frozen encoder as left out; with another VAE, theirs is left out, too."""
    _, (report,) = assemble(options(folder, tmp_path / "m"))
    assert sorted([*report.mapped, *report.left_out]) == sorted(theirs.state_dict())
    assert {key.split(".")[0] for key in report.left_out} == {"dinov2"}
    assert report.missing == report.unexpected == []
    key = "diffusion.unet.decoders.4.1.attention_1.in_proj.weight"
    start = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1"
    assert report.mapped[key] == [f"{start}.to_{letter}.weight" for letter in "qkv"]


def test_another_vae_replaces_theirs(folder: Path, make_parts: Callable[..., Any], tmp_path: Path) -> None:
    """vae= is taken where given."""
    make_parts("vae").save_pretrained(tmp_path / "vae")
    model, (report,) = assemble(options(folder, tmp_path / "m", vae=str(tmp_path / "vae")))
    expected = make_parts("vae").state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in model.vae.state_dict().items())
    assert {key.split(".")[0] for key in report.left_out} == {"dinov2", "encoder", "decoder"}


def test_what_does_not_fit_is_listed(folder: Path, theirs: TheirModel, tmp_path: Path) -> None:
    """Missing, misshapen and unexpected keys by name, in the error and in the file; no model."""
    weights = dict(theirs.state_dict())
    del weights["mlp.proj.1.blocks.1.layernorm_2.bias"]
    weights["diffusion.unet.bottleneck.1.attention_1.in_proj.weight"] = torch.zeros(192, 63)
    weights["diffusion.unet.encoders.4.1.attention_3.q_proj.weight"] = torch.zeros(2)
    weights["diffusion.control.weight"] = torch.zeros(2)
    torch.save({"state_dict": weights}, tmp_path / "b.ckpt")
    with pytest.raises(KeyMismatchError, match="1 missing, 1 wrong shape, 2 unexpected"):
        run(options(folder, tmp_path / "model", custom=tmp_path / "b.ckpt"))
    (report,) = json.loads((tmp_path / "model.keys.json").read_text())
    assert report["missing"] == ["projector.blocks.1.norm3.bias"]
    assert list(report["wrong_shape"]) == ["diffusion.unet.bottleneck.1.attention_1.in_proj.weight"]
    assert report["unexpected"] == ["diffusion.control.weight", "diffusion.unet.encoders.4.1.attention_3.q_proj.weight"]
    assert not (tmp_path / "model").exists()


def test_models_that_are_not_theirs(folder: Path, make_parts: Callable[..., Any], tmp_path: Path) -> None:
    """The later 17-channel model, Stable Diffusion itself, another encoder, another reference size."""
    later = TheirModel(channels=17).state_dict()
    torch.save({"state_dict": later}, tmp_path / "later.ckpt")
    with pytest.raises(CheckpointError, match=r"17 input .* later model .17."):
        assemble(options(folder, tmp_path / "m", custom=tmp_path / "later.ckpt"))
    torch.save({"state_dict": {"model.x": torch.ones(1)}}, tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of the authors"):
        assemble(options(folder, tmp_path / "m", custom=tmp_path / "sd.ckpt"))
    with pytest.raises(CheckpointError, match="Give it as custom="):
        assemble(options(folder, tmp_path / "m", custom=None, unet=str(folder / "a.ckpt")))
    make_parts("dinov2", hidden_size=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match=r"width 32, and the encoder .* gives 16"):
        assemble(options(folder, tmp_path / "m", encoder=str(tmp_path / "narrow")))
    with pytest.raises(ConfigError, match=r"51 null tokens; the encoder's grid of 4x3 has 12"):
        assemble(options(folder, tmp_path / "m", reference_height=56, reference_width=42))
    with pytest.raises(ConfigError, match="class_token=False"):
        assemble(options(folder, tmp_path / "m", class_token=False))


def test_true_shapes() -> None:
    """At the authors' widths every key finds its place in the networks of the true configuration."""
    with torch.device("meta"):
        weights = TheirModel((320, 640, 1280, 1280), 768, 1536, 1037, (128, 256, 512, 512)).state_dict()
        sd15 = UNet2DConditionModel(in_channels=12, cross_attention_dim=768)
        projector = ReferenceProjector(1536, 768, 1037)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    unet, unet_tensors = unet_in_our_names(authors_unet(weights), "x")
    their_vae, vae_tensors = vae_in_our_names(authors_vae(weights), "x")
    assert dict(unet.config)["block_out_channels"] == [320, 640, 1280, 1280]
    assert their_vae.state_dict().keys() == vae.state_dict().keys()
    report = key_report(
        "x",
        weights,
        {"unet": (sd15, unet_tensors), "projector": (projector, authors_projector(weights)), "vae": (vae, vae_tensors)},
        ours=("diffusion.", "mlp.", "encoder.", "decoder."),
    )
    assert report.complete
    assert report.unexpected == []
    assert sum(value.numel() for value in sd15.parameters()) == 859_520_964 + 8 * 320 * 9
