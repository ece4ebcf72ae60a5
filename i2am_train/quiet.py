"""Keeps the chatter of libraries off the terminal, so that a command's own output can be read.

Only messages that a user can do nothing about are silenced, each by its text; everything else still shows.
"""

import os
import warnings

LIGHTNING_REMARKS = (
    r".*Consider increasing the value of the `num_workers` argument.*",
    r".*does not have many workers.*",
    r".*is smaller than the logging interval.*",
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen networks, on purpose
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own use of torch
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    r".*You are using a CUDA device.*",
    r".*'set_vital' is deprecated.*",  # torchdata's own use of torch
    r"IProgress not found.*",  # in notebooks: bars are drawn as text all the same
)


def quiet_libraries() -> None:
    """Silence diffusers and transformers below errors, and these remarks; call before they are imported."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Pillow's remarks on broken EXIF entries that nobody asked for.
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    for text in LIGHTNING_REMARKS:
        warnings.filterwarnings("ignore", text)
