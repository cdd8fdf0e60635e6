"""How results are shown: plots, tables, and one HTML page."""
