"""A backend's life: where it lives, how it opens the log, and how it ends."""
