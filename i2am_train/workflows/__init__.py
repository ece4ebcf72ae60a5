"""What the commands of ``i2am`` do, from options to results.

Each module has ``run(config)`` for Python and a ``__main__`` block for the command line.
"""
