"""Site tables at true size, on the meta device, against what was counted in the models' own code."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection

from i2am_train.attention import named_recipe
from i2am_train.types import GridSize
from tests.support.recipe_models import NormalisedGarmentBlock, OwnBlock, RawGarmentBlock, with_blocks, with_ip_adapter

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet(base, **changes):
    return UNet2DConditionModel(**base | changes)


def with_garment(network, kind):
    """Blocks that join as many garment tokens as there are generated ones."""

    def join(block, args):
        block.reference = block.norm1(args[0]) if kind is NormalisedGarmentBlock else args[0]

    for block in with_blocks(network, kind).modules():
        if isinstance(block, OwnBlock):
            block.register_forward_pre_hook(join)
    return network


def face(network):
    width = network.config.cross_attention_dim
    return with_ip_adapter(network, IPAdapterFullImageProjection(1280, width), 257).unet


def base_adapter(network):
    width = network.config.cross_attention_dim
    return with_ip_adapter(network, ImageProjection(1024, width, 4), 4).unet


def site_table(network, name, latent, tokens, image=None):
    """Number of sites by generated grid, heads, head width, number and grid of reference tokens."""
    target = SimpleNamespace(unet=network, unet_vton=network)
    (site,) = named_recipe(target, name).sites
    modules = {path: module for path, module in network.named_modules() if site.layer_of(path)}
    sizes = {path: [None, None] for path in modules}
    for path, module in modules.items():
        for at, name in enumerate((site.generated_projection, site.reference_projection)):

            def keep(_, __, output, path=path, at=at):
                sizes[path][at] = output.flatten(1, -2).shape

            module.get_submodule(name).register_forward_hook(keep)
    evaluate(network.float(), latent, tokens, image)
    return Counter(row(site, modules[path], latent, *sizes[path]) for path in modules)


def evaluate(network, latent, tokens, image):
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    if image is not None:
        added["image_embeds"] = [torch.empty(1, 1, *image)]
    context = torch.empty(1, tokens, network.config.cross_attention_dim)
    sample = torch.empty(1, network.config.in_channels, *latent)
    with torch.no_grad():
        network(sample, torch.tensor(1), context, added_cond_kwargs=added)


def row(site, module, latent, generated, reference):
    places = (site.generated.places(generated[1], latent), site.reference.places(reference[1], latent))
    width = generated[-1] // module.heads
    return str(places[0].grid), module.heads, width, places[1].count, str(places[1].grid)


def decoder(latent, heads, widths, tokens, grid):
    """Three sites on each of three grids, coarse to fine."""
    sizes = [GridSize(latent.height // by, latent.width // by) for by in (4, 2, 1)]
    rows = zip(sizes, heads, widths, strict=True)
    return {(str(size), head, width, tokens, str(grid)): 3 for size, head, width in rows}


def joint(*rows):
    """Sites whose reference lies on the grid of the generated tokens."""
    return {(grid, heads, width, tokens, grid): count for count, grid, heads, width, tokens in rows}


VITON, SQUARE, LARGE = GridSize(64, 48), GridSize(64, 64), GridSize(128, 96)
TABLES = {
    "paint_by_example": (
        lambda: unet(SD15, in_channels=9),
        (SQUARE, 1),
        decoder(SQUARE, (8, 8, 8), (160, 80, 40), 1, None),
    ),
    "ladi_vton": (lambda: unet(SD2, in_channels=31), (VITON, 77), decoder(VITON, (20, 10, 5), (64, 64, 64), 16, None)),
    "catvton": (
        lambda: unet(SD15, in_channels=9),
        (GridSize(128, 48), 1),
        joint((5, "64x48", 8, 40, 3072), (5, "32x24", 8, 80, 768), (5, "16x12", 8, 160, 192), (1, "8x6", 8, 160, 48)),
    ),
    "ootdiffusion": (
        lambda: with_garment(unet(SD15, in_channels=8), RawGarmentBlock),
        (LARGE, 2),
        joint(
            (5, "128x96", 8, 40, 12288), (5, "64x48", 8, 80, 3072), (5, "32x24", 8, 160, 768), (1, "16x12", 8, 160, 192)
        ),
    ),
    "idm_vton": (
        lambda: with_garment(unet(SDXL, in_channels=13), NormalisedGarmentBlock),
        (LARGE, 77),
        joint((60, "32x24", 20, 64, 768), (10, "64x48", 10, 64, 3072)),
    ),
    "ip_adapter_full_face": (
        lambda: face(unet(SD15)),
        (SQUARE, 77, (257, 1280)),
        {
            ("64x64", 8, 40, 256, "16x16"): 5,
            ("32x32", 8, 80, 256, "16x16"): 5,
            ("16x16", 8, 160, 256, "16x16"): 5,
            ("8x8", 8, 160, 256, "16x16"): 1,
        },
    ),
    "ip_adapter": (
        lambda: base_adapter(unet(SDXL)),
        (LARGE, 77, (1024,)),
        {("32x24", 20, 64, 4, "None"): 60, ("64x48", 10, 64, 4, "None"): 10},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_sites_of_the_true_architecture(name):
    make, call, expected = TABLES[name]
    with torch.device("meta"):
        found = site_table(make(), name, *call)
    assert found == expected
