"""What is measured on a trained model.

The functions give one value per sample, in float32, and NaN where a sample has none (an empty mask). Image metrics are
torchmetrics classes as well, which see each sample once, over all processes.
"""
