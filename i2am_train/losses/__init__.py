"""Training losses: pure functions of a layer's attention or of predictions, one value per sample.

No term carries a weight; :class:`i2am_train.losses.objective.Objective` is the one place that applies them.
"""
