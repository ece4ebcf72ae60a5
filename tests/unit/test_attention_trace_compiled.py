"""`trace` on a model whose repeated blocks are compiled: each stays one graph, and nothing is missed in silence.

In a process of its own: the tests' executed tensor shapes would be compiled, too, and break the graphs.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys
from contextlib import nullcontext
import torch
from torch import nn
from torch._dynamo.utils import counters
from i2am_train.attention import ScoreTap, guard_hooks, trace
from i2am_train.attention.compiled import compiled_graphs
from i2am_train.errors import CaptureError
from i2am_train.models.architecture import Architecture, build_model
from i2am_train.models.sampling import sample
from i2am_train.types import GridSize

backend = sys.argv[1]
torch.manual_seed(0)
model = build_model(GridSize(64, 48), Architecture(
    unet_widths=(16, 16, 32, 32), heads=(1, 2, 4, 4), context_width=32, vae_widths=(8, 8, 16), encoder_width=32,
    encoder_layers=1, encoder_heads=2,
)).eval()
pictures = torch.rand(3, 2, 3, 64, 48) * 2 - 1
blocks = [module for module in model.unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
found = {"apart": [], "images": [], "graphs": {}, "refused": {}}


def images(steps=2):
    return sample(model, *pictures, seeds=[3, 4], steps=steps)


def traced(steps=2, **options):
    with trace(model, **options) as attention:
        made = images(steps)
    return made, attention.maps().store


def compare(expected, **options):
    made, store = traced(**options)
    assert store.names == eager.names
    found["images"].append(torch.equal(made, expected))
    for one, other in zip(store.layers, eager.layers):
        for name in ("to_generated", "to_reference"):
            right = getattr(other, name)
            assert getattr(one, name).shape == right.shape
            found["apart"].append(float((getattr(one, name) - right).abs().max() / right.abs().max()))


def refused(name, call):
    try:
        call()
    except CaptureError as error:
        found["refused"][name] = str(error)


def count(name, since=0):
    found["graphs"][name] = compiled_graphs() - since


shapes = []
handles = [
    block.register_forward_pre_hook(lambda module, inputs: shapes.append((id(module), tuple(inputs[0].shape))))
    for block in blocks
]
_, eager = traced(1)
for handle in handles:
    handle.remove()
listened = {id(block) for name in eager.names for block in model.unet.get_submodule(name).transformer_blocks}
found["shapes"] = len({shape for _, shape in shapes})
found["listened shapes"] = len({shape for block, shape in shapes if block in listened})
expected, eager = traced()

# as torch comes: the model runs uncompiled inside the trace
model.unet.compile_repeated_blocks(backend=backend, dynamic=False, fullgraph=True)
images()
count("unguarded")
compare(expected)
count("unguarded, traced")

# guarded too late: what was compiled is in use
guard_hooks()
calls = [block._compiled_call_impl for block in blocks]
refused("late", traced)
found["restored"] = calls == [block._compiled_call_impl for block in blocks]
torch.compiler.reset()

start = compiled_graphs()
plain = images()
count("plain", start)
traced(1)
count("one traced step", start)
compare(plain)
compare(plain)
found["images"].append(torch.equal(images(), plain))
compare(plain)
count("traced again and again", start)
with torch.inference_mode():
    compare(images())

# a tap and a trace at once, and without a trace
latents, tokens = torch.randn(2, 12, 16, 12), torch.randn(2, 48, 32)
scores = []
for both in (True, False):
    with ScoreTap(model, layers=[2, 5]) as tap, trace(model, rows="all") if both else nullcontext() as attention:
        model.unet(latents, torch.tensor(500), tokens)
        scores.append([tap.scores(layer) for layer in (2, 5)])
    if both:
        found["heard at once"] = [site.calls for site in attention.sites]
found["same scores"] = all(torch.equal(one, other) for one, other in zip(*scores))
found["scores learn"] = bool(torch.autograd.grad(scores[0][0].sum(), model.unet.conv_in.weight)[0].any())


def masked():
    with trace(model, rows="all"), torch.no_grad():
        model.unet(latents, torch.tensor(500), tokens, encoder_attention_mask=torch.arange(48).expand(2, -1) > 0)


refused("masked", masked)

# what hooks cannot be heard through runs uncompiled
before = compiled_graphs()
compare(expected, via="sdpa")
model.unet.forward = torch.compile(model.unet.forward, backend=backend)
compare(expected)
del model.unet.forward
model.unet.compile(backend=backend)
compare(expected)
model.unet._compiled_call_impl = None
count("uncompiled", before)
found["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
found["breaks"] = dict(counters["graph_break"])
print(json.dumps(found))
"""


def sampled(backend: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, backend],
        capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=pytest.mark.long),
        pytest.param("inductor", marks=pytest.mark.slow),  # minutes of a C++ compiler
    ],
)
def test_a_compiled_model_stays_compiled_under_a_trace(backend: str) -> None:
    """One graph for each shape of a block, one more for each shape that is listened to, and no other ever after."""
    found = sampled(backend)
    assert all(found["images"])
    assert max(found["apart"]) < 1e-6
    plain = found["shapes"]
    with_trace = plain + found["listened shapes"]
    assert found["graphs"] == {
        "unguarded": plain,
        "unguarded, traced": plain,
        "plain": plain,
        "one traced step": with_trace,
        "traced again and again": with_trace,
        "uncompiled": 0,
    }
    assert found["breaks"] == {}
    assert found["restored"]
    assert "ran, and its attention was not seen" in found["refused"]["late"]
    assert "torch.compiler.reset()" in found["refused"]["late"]
    assert "attends under a mask (attention_mask)" in found["refused"]["masked"]
    assert found["heard at once"] == [1] * 9
    assert found["same scores"]
    assert found["scores learn"]
    assert found["hooks"] == 0
