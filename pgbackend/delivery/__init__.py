"""From a page of the log to the committed offset."""
