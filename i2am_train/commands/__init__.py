"""The commands of ``i2am``.

Each module has ``run(config)`` for Python and a ``__main__`` block for the command line.
"""
