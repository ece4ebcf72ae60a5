"""Options: typed and described in one file per package, checked by ``build``, composed in ``store``."""
