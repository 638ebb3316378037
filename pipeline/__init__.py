"""Rows: tables in, tables out, every input row accounted for. Ray only in dataset.py and training.py."""
