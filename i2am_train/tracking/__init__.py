"""Weights & Biases: what is stored there, under which names, and how runs, data and models belong together.

``names`` lists the scalars, ``session`` opens and ends runs (offline too, and where the network dies), ``media`` makes
tables and mask overlays, ``artifacts`` the lineage data -> run -> checkpoint -> evaluation, ``study`` the run that sums
up an ablation, ``dashboard`` the workspace and the report.
"""
