"""Small models with random weights that read photographs of persons: a parser and a pose estimator, as folders."""

from pathlib import Path

import torch
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
)

ATR = [
    "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt", "Left-shoe",
    "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf",
]  # fmt: skip
LIP = [
    "Background", "Hat", "Hair", "Glove", "Sunglasses", "UpperClothes", "Dress", "Coat", "Socks", "Pants",
    "Jumpsuits", "Scarf", "Skirt", "Face", "Left-arm", "Right-arm", "Left-leg", "Right-leg", "Left-shoe",
    "Right-shoe",
]  # fmt: skip


def tiny_parser(folder: Path, labels: list[str], wanted: int | None = None) -> Path:
    """A SegFormer; ``wanted`` makes it predict one label everywhere."""
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    if wanted is not None:
        with torch.no_grad():
            model.decode_head.classifier.bias[wanted] = 1000.0
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def tiny_pose_estimator(folder: Path, joints: int = 17) -> Path:
    """A ViTPose of 64x48 pixels."""
    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        out_indices=[1],
    )  # fmt: skip
    config = VitPoseConfig(backbone_config=backbone, num_labels=joints, use_simple_decoder=True)
    VitPoseForPoseEstimation(config).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
    return folder
