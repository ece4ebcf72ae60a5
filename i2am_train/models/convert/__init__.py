"""Weights and models of other layouts, taken over into ours and written for others."""
