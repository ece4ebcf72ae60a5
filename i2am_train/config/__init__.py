"""Options: typed and described in ``schema``, checked by ``build``, composed in ``store``."""
