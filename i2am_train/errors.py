"""Errors that a user can act on. The command line prints their text as one paragraph and exits with status 2.

Each message says what was found, what was expected, and what to do.
"""


class I2AMError(Exception):
    """Base of every error that is the input's fault and not the program's."""


class ConfigError(I2AMError):
    """An option has an impossible value, or two options contradict each other."""


class DataError(I2AMError):
    """A dataset folder, a pair list or an image is missing, unreadable or inconsistent."""


class CaptureError(I2AMError):
    """Attention cannot be captured: no such layer, a grid that does not fit, a fused projection."""


class CheckpointError(I2AMError):
    """A checkpoint is missing, half-written or of another architecture."""


class WeightsMissingError(I2AMError):
    """A metric needs network weights that are not on this machine and cannot be fetched."""


class TrackingError(I2AMError):
    """Weights & Biases cannot be reached, or refuses what it is asked for."""


class RunFolderError(I2AMError):
    """A run folder already holds something that this run would overwrite."""
