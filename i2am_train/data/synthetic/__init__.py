"""The embedded procedural dataset: drawn people in drawn garments, with the exact correspondence."""
