"""attention/README.md is true: its blocks run as they stand, on a model such as it describes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from i2am_train.attention import known as recipes
from i2am_train.types import GridSize

README = (Path(recipes.__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OWN = next(number for number, block in enumerate(BLOCKS) if "register(" in block)
"""Where a model of your own begins."""
LATENT, GARMENT, WIDTH = GridSize(12, 8), GridSize(6, 5), 8


class GarmentAttention(nn.Module):
    """A text attention of diffusers, with one of the garment beside it."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.attn2 = block.norm2, block.attn2
        self.attn_garment = Attention(block.dim, WIDTH, heads=2, dim_head=block.dim // 2)

    def forward(self, hidden, encoder_hidden_states, **_):
        normalised = self.norm(hidden)
        text = self.attn2(normalised, encoder_hidden_states=encoder_hidden_states)
        garment = self.attn_garment(normalised, encoder_hidden_states=self.garment)
        return hidden + text + garment


class MyPipeline:
    """The user's pipeline, as small as can be."""

    def __init__(self):
        torch.manual_seed(0)
        sizes = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
        unet = UNet2DConditionModel(**sizes, attention_head_dim=2, cross_attention_dim=WIDTH)
        for path, module in unet.named_modules():
            if path.startswith("up_blocks") and hasattr(module, "transformer_blocks"):
                blocks = [GarmentAttention(block) for block in module.transformer_blocks]
                module.transformer_blocks = nn.ModuleList(blocks)
        self.unet = unet.eval()

    @torch.no_grad()
    def __call__(self, guidance, **_):
        do_classifier_free_guidance = guidance != 1
        rows = 4 if do_classifier_free_guidance else 2
        for module in self.unet.modules():
            if isinstance(module, GarmentAttention):
                module.garment = torch.randn(rows, GARMENT.tokens + 1, WIDTH)
        sample, text = torch.randn(rows, 4, *LATENT), torch.randn(rows, 7, WIDTH)
        return self.unet(sample, torch.tensor(500), text).sample

    @classmethod
    def load(cls, checkpoint):
        return cls()

    def to(self, device):
        self.unet.to(device)
        return self


@pytest.fixture
def ran(monkeypatch, capsys):
    """Names after all blocks ran one after the other, and what they printed."""
    monkeypatch.setattr(recipes, "_REGISTERED", [])
    names = {"pipeline": MyPipeline(), "MyPipeline": MyPipeline}
    traces, printed = [], []
    for block in BLOCKS:
        exec(compile(block, "attention/README.md", "exec"), names)
        traces.append(names.get("attention"))
        printed.append(capsys.readouterr().out)
    return SimpleNamespace(names=names, traces=traces[OWN + 1 :], printed=printed)


def test_all_blocks_run(ran):
    # the maps are those of the model described: nine layers, 6x5 patches without the class token
    assert ran.names["on_person"].values.shape == (2, *LATENT)
    assert ran.names["on_garment"].values.shape == (2, *GARMENT)
    assert "".join(ran.printed[OWN:]).count("up_blocks.") == 9
    assert all(trace.maps().store.recipe == "my_tryon" for trace in ran.traces)
    assert {trace.maps().store.batch for trace in ran.traces} == {2}


def test_the_package_s_model_runs(ran):
    # its sites are printed, and a score for each of two samples
    (printed,) = (text for text in ran.printed[:OWN] if text)
    assert "up_blocks.1.attentions.1" in printed
    assert ran.names["looks_at"].values.shape[0] == 2


def test_it_takes_ten_lines():
    # imports, blank lines and the docstring are not counted
    lines = [line.strip() for line in BLOCKS[OWN].splitlines()]
    assert sum(not line.startswith(("from ", '"""')) and line != "" for line in lines) <= 10


def test_the_factory_returns_what_explain_takes(ran):
    pipeline, recipe = ran.names["build"]("folder", torch.device("cpu"))
    assert callable(pipeline)
    assert recipe.name == "my_tryon"


def test_every_recipe_word_in_the_table_exists():
    # keywords in the table are fields of the classes
    from dataclasses import fields

    from i2am_train.attention import Recipe, Site, Tokens

    known = {field.name for kind in (Recipe, Site, Tokens) for field in fields(kind)}
    table = README[README.index("| the model |") : README.index("`joint=True` also")]
    words = set(re.findall(r"(\w+)=", table))
    assert words - known == set()
