"""Judging a model on held-out samples: sampling, attention scores, image metrics, and the files that hold them."""
