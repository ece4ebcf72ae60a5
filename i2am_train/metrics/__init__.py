"""What is measured on a trained model: each metric as a pure function and as a torchmetrics class.

The functions give one value per sample, in float32, and NaN where a sample has none (an empty
mask). The classes average over the samples that have a value, each once, over all processes.
"""
