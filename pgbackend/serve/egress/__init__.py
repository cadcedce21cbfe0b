"""Dispatches events to the HTTP targets of the configuration's triggers."""
