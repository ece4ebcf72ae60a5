"""Folder layouts of datasets: VITON-HD, DressCode, and what they share."""
