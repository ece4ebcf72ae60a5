"""``i2am data make``: the embedded dataset. ``i2am data check``: what is wrong with a folder."""

from __future__ import annotations

import sys

from i2am_train.commands.entry import FAILED_CHECK, HELP_FLAGS, entry, errors_as_text
from i2am_train.config.locations import dataset_folder
from i2am_train.config.schema import DataCheckConfig, DataMakeConfig
from i2am_train.errors import ConfigError


def make(config: DataMakeConfig) -> None:
    """Make the synthetic dataset that the options describe."""
    from i2am_train.datasets.synthetic import make_dataset

    root = config.root or dataset_folder(config.size, config.train, config.test, config.seed)
    make_dataset(
        root,
        config.train,
        config.test,
        config.size,
        config.seed,
        workers=config.workers,
        progress=True,
    )
    print(f"{config.train} training and {config.test} held-out samples of {config.size} in {root}")


def check(config: DataCheckConfig) -> int:
    """Print the report on a dataset folder; status 1 if training would fail."""
    from i2am_train.datasets.checks import check_dataset
    from i2am_train.datasets.opening import Reading
    from i2am_train.runs import write_text

    reading = Reading(config.layout, tuple(config.categories))
    report = check_dataset(config.root, config.size, reading=reading)
    print(report.table())
    if config.json is not None:
        write_text(config.json, report.to_json())
    return 0 if report.ok else FAILED_CHECK


HELP = """\
usage: i2am data make|check [name=value ...]

  make    make a synthetic try-on dataset with exact correspondence, in VITON-HD layout
  check   report everything that is wrong with a dataset folder
          (exit status 1 if training would fail)

`i2am data make --help` and `i2am data check --help` list the options."""


def main() -> None:
    """Run the sub-command that the command line names."""
    action = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if action in HELP_FLAGS:
        print(HELP)
        return
    del sys.argv[1]  # Hydra reads what is left
    if action == "make":
        entry("data_make", make)
    if action == "check":
        entry("data_check", check)
    with errors_as_text():
        raise ConfigError(f"There is no command 'i2am data {action}'. There are make and check.")


if __name__ == "__main__":
    main()
