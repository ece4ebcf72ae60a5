"""Training losses: pure functions of attention scores or predictions, one value per sample.

No term carries a weight; :mod:`i2am_train.losses.objective` is the one place that applies them.
"""
