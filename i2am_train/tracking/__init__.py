"""Weights & Biases: what is stored there, under which names, and how runs, data and models belong together.

``names`` lists the scalars, ``session`` opens and ends runs (offline too, and where the network dies) with the lineage
data -> run -> checkpoint -> evaluation, ``scores`` makes tables, mask overlays and the runs of finished evaluations and
ablations, ``dashboard`` the workspace and the report.
"""
