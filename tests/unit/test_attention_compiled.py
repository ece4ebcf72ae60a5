"""A tap and a trace on a network under torch.compile, as `optimization.compile` sets it.

In a process of its own: the tests' executed tensor shapes would be compiled, too, and break the graphs.
"""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from diffusers import UNet2DConditionModel
from i2am_train.attention import ScoreTap, diffusers_decoder, trace
from i2am_train.models.lora import add_adapters
from i2am_train.ops.rows import log_head_scores
from i2am_train.attention.compiled import compiled_graphs, guard_hooks
from i2am_train.types import GridSize

kind = sys.argv[1]
LAYER, LATENT, REFERENCE = "up_blocks.0.attentions.1", GridSize(12, 8), GridSize(5, 4)
RECIPE = diffusers_decoder(REFERENCE, root="", rows="all")
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=tuple(LATENT), in_channels=12, out_channels=4, block_out_channels=(8,), attention_head_dim=2,
    cross_attention_dim=10, norm_num_groups=4, layers_per_block=1, mid_block_type=None,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
).train()
inputs = torch.randn(3, 12, *LATENT), torch.tensor([10, 500, 900]), torch.randn(3, 20, 10)
if kind == "lora":
    add_adapters(unet, rank=2, alpha=2)
if kind == "checkpointing":
    unet.enable_gradient_checkpointing()


def step():
    unet.zero_grad()
    with ScoreTap(unet, RECIPE, layers=[LAYER]) as tap:
        prediction = unet(*inputs).sample
        scores = tap.scores(LAYER)
        heads = log_head_scores(*tap.tokens(LAYER))
        (prediction.square().mean() + scores.square().sum() + heads.exp().square().sum()).backward()
    gradients = {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}
    return {"prediction": prediction.detach(), "scores": scores.detach(), "heads": heads.detach(), **gradients}


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / (1e-6 + other[n].abs().max())) for n in other)


eager = step()
if kind != "unguarded":
    guard_hooks()
unet.compile(backend="inductor" if kind == "inductor" else "aot_eager")
if kind in ("tap later", "unguarded"):
    unet(*inputs).sample.sum().backward()
found = {"apart": [apart(step(), eager)], "graphs": [compiled_graphs()]}
with trace(unet, RECIPE) as attention, torch.no_grad():
    unet(*inputs)
found["traced"] = [site.calls for site in attention.sites]
found["apart"].append(apart(step(), eager))
found["graphs"].append(compiled_graphs())
print(json.dumps(found))
"""


def compiled(kind: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, kind],
        capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [
        pytest.param("plain", 1, marks=pytest.mark.long),
        pytest.param("inductor", 1, marks=pytest.mark.slow),  # minutes of a C++ compiler
        pytest.param("lora", 1, marks=pytest.mark.slow),
        pytest.param("tap later", 2, marks=pytest.mark.slow),
        pytest.param("checkpointing", 1, marks=pytest.mark.slow),
    ],
)
def test_scores_and_gradients_are_those_without_compilation(kind: str, graphs: int) -> None:
    """From one graph; a trace in between is eager and leaves it in use.

    A tap that comes after the first compiled step is heard: the network is compiled once more.
    """
    done = compiled(kind)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["apart"]) < 1e-5
    assert found["traced"] == [1, 1]
    assert found["graphs"] == [graphs, graphs]


@pytest.mark.slow
def test_hooks_that_were_compiled_away_are_missed() -> None:
    """Where a network was compiled without guards before the tap came, the error says so."""
    done = compiled("unguarded")
    assert done.returncode != 0
    assert "CaptureError" in done.stderr
    assert "skip_nnmodule_hook_guards=False" in done.stderr
