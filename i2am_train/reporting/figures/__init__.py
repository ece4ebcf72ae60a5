"""Figures: a sheet as data, what stands in it, and the files it becomes."""
