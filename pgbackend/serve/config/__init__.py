"""Reads the configuration file and follows its changes."""
