"""The log: append, prove, read."""
