"""The try-on model, its sampling, and how it is made, saved and loaded."""
