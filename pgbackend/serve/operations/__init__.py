"""Logs, metrics and traces of the broker."""
