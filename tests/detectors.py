"""Tiny detectors as folders of transformers: one that always sees the same, and one with random weights."""

import math
from pathlib import Path

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
        torch.manual_seed(0)
        MaskFormerForInstanceSegmentation(
            MaskFormerConfig(
                fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone, decoder_config=decoder,
                id2label=LABELS, label2id={v: k for k, v in LABELS.items()},
            )
        ).save_pretrained(folder)  # fmt: skip
    MaskFormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}, num_labels=2
    ).save_pretrained(folder)
    return folder
