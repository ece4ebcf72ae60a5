"""Other people's models, loaded and asked in one way, so that `i2am explain` can trace them."""
