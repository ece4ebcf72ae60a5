"""Pure tensor functions shared by attribution, losses and metrics.

No state, no configuration, no device placement, no logging, no randomness.
"""
