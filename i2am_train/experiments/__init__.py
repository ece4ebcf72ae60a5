"""Whole experiments of the paper that are no part of training or judging a try-on model."""
