"""``python -m i2am_train`` is ``i2am``."""

from i2am_train.cli import main

if __name__ == "__main__":
    main()
