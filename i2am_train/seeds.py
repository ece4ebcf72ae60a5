"""Seeds of single purposes: the one place where a run's seed becomes that of a sample's noise.

Randomness is an argument and belongs to a sample, not to a stream that several readers share: a sample draws the same
numbers alone, in any batch, on any number of processes, and after a restart.
"""

import hashlib
import json


def seed_for(run_seed: int, *names: str | int) -> int:
    """A seed for one named purpose of a run, in [0, 2**63); the same on every machine.

    ``names`` begin with the purpose, so that two uses of the same run seed never share numbers.

    >>> seed_for(0, "sampling", 17) == seed_for(0, "sampling", 17) != seed_for(1, "sampling", 17)
    True
    """
    digest = hashlib.sha256(json.dumps([run_seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
