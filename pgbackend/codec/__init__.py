"""CloudEvents in, rows out."""
