"""CloudEvents out, over HTTP."""
