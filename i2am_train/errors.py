"""Errors that a user can act on. The command line prints their text as one paragraph and exits with status 2.

Each message says what was found, what was expected, and what to do.
"""

import signal


class I2AMError(Exception):
    """Base of every error that is the input's fault and not the program's."""

    status = 2
    """Exit status of a command that ends with it."""


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


class NotFiniteError(I2AMError):
    """A model computed NaN or infinity: no picture, map or score can come of it."""


class RunFolderError(I2AMError):
    """A run folder already holds something that this run would overwrite."""


class FolderInUseError(RunFolderError):
    """Another command writes the folder at this moment."""


class OutputError(I2AMError):
    """The operating system refuses to write: a full disk, a read-only folder, an impossible path."""


class ProcessKilledError(I2AMError):
    """A process that reads or draws samples for the command was killed by the system."""


class TaskFailedError(I2AMError):
    """One of the processes that a command has its work done by ended with an error."""


class TrainingError(I2AMError):
    """Training cannot go on: a loss or gradient that is not finite, or too little memory."""


class TrainingInterruptedError(I2AMError):
    """Training was told to stop, saved its state and can be continued."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name} received: training stopped after step {step}, its state is saved. The same command continues it."
        )
        self.status = 128 + number


class CommandStopped(BaseException):
    """A signal told the command to stop. Not an ``Exception``, so that nothing that handles errors swallows it."""

    def __init__(self, number: int, done: str = "the command was stopped.") -> None:
        super().__init__(f"{signal.Signals(number).name} received: {done}")
        self.status = 128 + number
