"""seeds.py: seeds of different purposes are independent, and the numbers never change."""

from i2am_train.seeds import seed_for


def test_seeds_are_independent_and_fixed() -> None:
    """Names and order matter, 1 and "1" differ, and the numbers do not change between versions."""
    names = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, 1), (0, "1")]
    seeds = {seed_for(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, "sample", 17) == 6789696623468995921
