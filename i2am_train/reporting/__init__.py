"""What a run has to show: tables, figures and pages, made of files alone; no model, no dataset, no configuration."""
