"""CloudEvents in, over HTTP."""
