"""Adapters as peft wraps them, without peft: the original projection hides behind ``base_layer``."""

from torch import nn


class LoraLinear(nn.Module):
    """One wrapped projection."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, tokens):
        return self.base_layer(tokens) + self.up(self.down(tokens))


def add_lora(unet):
    """Wraps the query and key projections of every attention; gives the network back."""
    for module in list(unet.modules()):
        for name in ("to_q", "to_k"):
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, LoraLinear(getattr(module, name)))
    return unet
