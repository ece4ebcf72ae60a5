"""What a run has to show: statistics, tables, figures and the report page.

Reads ``results.json`` and what the cells kept; needs no model, no dataset and no configuration.
Import the modules: ``statistics`` (summary and paired differences), ``tables`` and
``table_formats`` (terminal, Markdown, HTML, LaTeX), ``figures`` (also for callbacks and ``i2am
explain``) and ``report`` (the page). This file imports nothing, so that statistics cost no
matplotlib.
"""
