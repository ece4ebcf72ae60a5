"""Tiny detectors as folders of transformers: one that always sees the same, and some with random weights."""

import math
from pathlib import Path
from typing import Any

LABELS = {0: "cup", 1: "dog"}


def tiny_yolos(folder: Path, box: tuple[float, float, float, float], score: float) -> Path:
    """A YOLOS that sees cups only, at ``box`` (centre x, y, width, height in shares of the picture), with ``score``."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 48],
        patch_size=16, num_detection_tokens=3, id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
        use_mid_position_embeddings=False,
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    others = math.log((1 - score) / 2 / score)  # of the softmax over cup, dog and nothing
    for head, bias in (
        (model.bbox_predictor, [math.log(share / (1 - share)) for share in box]),
        (model.class_labels_classifier, [0.0, others, others]),
    ):
        last = head.layers[-1]
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor(bias)
    model.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(folder)
    return folder


def spread(model: Any) -> None:
    """Larger weights: those that training begins with are so small that all queries find the same."""
    import torch

    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.xavier_normal_(weight)


def tiny_maskformer(folder: Path) -> Path:
    """A MaskFormer with random weights."""
    import torch
    from transformers import (
        DetrConfig,
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        MaskFormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=4,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(20)  # masks that do not fill the picture
        model = MaskFormerForInstanceSegmentation(
            MaskFormerConfig(
                fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone, decoder_config=decoder,
                id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
            )
        )  # fmt: skip
        spread(model)
    model.save_pretrained(folder)
    MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, num_labels=2).save_pretrained(folder)
    return folder


def tiny_rt_detr(folder: Path, version: int = 1) -> Path:
    """An RT-DETR (``version`` 1 or 2) with random weights that sees cups and dogs everywhere."""
    import torch
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        RTDetrResNetConfig,
        RTDetrV2Config,
        RTDetrV2ForObjectDetection,
    )

    kinds = {1: (RTDetrConfig, RTDetrForObjectDetection), 2: (RTDetrV2Config, RTDetrV2ForObjectDetection)}
    kind, network = kinds[version]
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )  # fmt: skip
    config = kind(
        backbone_config=backbone, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=16, encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_layers=2,
        decoder_attention_heads=2, decoder_n_points=2, num_queries=84, num_denoising=0,
        id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = network(config)
        spread(model)
        for head in model.model.decoder.class_embed:
            torch.nn.init.zeros_(head.bias)
    model.save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
