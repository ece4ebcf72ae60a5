"""Finished runs and evaluations read back, and the statistics over them."""
