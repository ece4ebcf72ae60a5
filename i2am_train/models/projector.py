"""The trainable part between a frozen image encoder and the U-Net's cross-attention (paper A.5).

This file is copied into exported models, so it imports nothing that diffusers does not.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class ReferenceProjector(ModelMixin, ConfigMixin):
    """Maps encoder tokens to the U-Net's context, and owns the learned null tokens of guidance.

    LayerNorm, ``depth`` pre-norm transformer blocks with ``heads`` heads and a GEGLU feed-forward, one linear layer
    (the authors: 3 blocks of 1 head, width 1536 to 768). The null tokens are one learned vector for each token,
    drawn from N(0, 1), as in the authors' code.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, encoder_width: int, context_width: int, tokens: int, depth: int = 3, heads: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(encoder_width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(encoder_width, heads, encoder_width // heads, activation_fn="geglu")
            for _ in range(depth)
        )
        self.output = nn.Linear(encoder_width, context_width)
        self.null_tokens = nn.Parameter(torch.randn(1, tokens, context_width))

    def forward(self, tokens: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Context tokens ``[batch, token, context_width]`` of encoder tokens ``[batch, token, encoder_width]``.

        Those of ``dropped`` samples (see :meth:`drop`) are the null tokens.

        >>> projector = ReferenceProjector(encoder_width=8, context_width=6, tokens=5, depth=1)
        >>> projector(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 6])
        """
        hidden = self.norm(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        projected: Tensor = self.output(hidden)
        return projected if dropped is None else self.drop(projected, dropped)

    def drop(self, tokens: Tensor, dropped: Tensor) -> Tensor:
        """Replaces the context tokens of samples by the null tokens where ``dropped`` (bool ``[batch]``) is true.

        Other inputs stay.

        >>> projector = ReferenceProjector(encoder_width=8, context_width=6, tokens=5, depth=1)
        >>> kept, dropped = projector.drop(torch.zeros(2, 5, 6), torch.tensor([False, True]))
        >>> bool((kept == 0).all()), bool((dropped == projector.null_tokens[0]).all())
        (True, True)
        """
        return torch.where(dropped[:, None, None], self.null_tokens.to(tokens.dtype), tokens)
