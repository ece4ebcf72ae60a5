"""From Stable Diffusion's files to a trained try-on model on the command line, small and at true size."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

PEAK = re.compile(r"peak memory (\d+\.\d+) GiB")

STEP = '''
import resource, sys, time
from pathlib import Path
import torch
from i2am_train.config.schema import InitConfig, ObjectiveConfig, OptimizationConfig
from i2am_train.assembly import make_objective
from i2am_train.commands.init import description
from i2am_train.models.parts import assemble
from i2am_train.models.sampling import sample
from i2am_train.training.module import TryOnModule
from i2am_train.training.optimization import trained_weights

root, kind = Path(sys.argv[1]), sys.argv[2]
sources = {
    "folder": {"unet": str(root / "sd"), "encoder": str(root / "clip")},
    "safetensors": {"unet": str(root / "sd.safetensors"), "vae": str(root / "vae.ckpt")},
    "custom": {"custom": root / "custom.ckpt"},
}
given = {"encoder": str(root / "dinov2"), "output": root / "model", **sources[kind]}
started = time.monotonic()
model, _ = assemble(InitConfig(**given))
print(description(model))
print(f"read in {time.monotonic() - started:.0f} s")
assert model.unet.config["cross_attention_dim"] == 768
assert str(model.reference_grid) == "37x28" and str(model.latent_size) == "64x48"
options = OptimizationConfig(trainable="cross_attention", learning_rate=1e-3, warmup_steps=0)
objective = make_objective(ObjectiveConfig(variant="authors_v2", dcml=0.01, tv=1e-4, cwg=2.0), options)
module = TryOnModule(model, objective, options)
module.on_train_epoch_start()
print(trained_weights(model))
model.unet.enable_gradient_checkpointing()
generator = torch.Generator().manual_seed(0)
pictures = {n: torch.rand(1, 3, 512, 384, generator=generator) * 2 - 1 for n in ("image", "agnostic", "densepose", "garment")}
mask = torch.zeros(1, 1, 512, 384)
mask[..., 100:400, 80:300] = 1
batch = {**pictures, "name": ["a"], "index": torch.tensor([0]), "warped_garment_mask": mask, "inpaint_mask": mask, "garment_mask": mask}
optimizer = module.configure_optimizers()["optimizer"]
module.on_train_start()
before = model.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2.to_k.weight.detach().clone()
losses = []
from i2am_train.training.draws import draw
for epoch in range(2):
    draws = draw(0, epoch, [0], latent=model.latent_size, timesteps=1000, condition_dropout=0.0)
    parts = objective(model, batch, draws, module._tap)
    parts["total"].backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append({n: round(float(v), 5) for n, v in parts.items()})
module.teardown("fit")
print("losses", losses)
assert all(torch.isfinite(torch.tensor(list(part.values()))).all() for part in losses)
after = model.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2.to_k.weight.detach()
assert not torch.equal(before, after)
del optimizer
conditions = {n: pictures[n] for n in ("garment", "agnostic", "densepose")}
image = sample(model.eval(), **conditions, seeds=[0], steps=1, guidance=5.0)
assert image.shape == (1, 3, 512, 384) and image.isfinite().all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{kind}: two steps and a sample in {time.monotonic() - started:.0f} s, peak memory {peak:.1f} GiB")
'''
