"""Configurations as text."""

from tests.serve.support.target import Target


def triggers(**bodies: str) -> str:
    """A configuration with these triggers, each given as the text between its braces."""
    return "triggers: {" + ", ".join(f"{name}: {{{body}}}" for name, body in bodies.items()) + "}"


def to(target: Target, options: str = "") -> str:
    """The body of a trigger with this target."""
    return f"target: {{url: '{target.url}'}}{', ' if options else ''}{options}"


def config(target: Target, options: str = "") -> str:
    """A configuration with the trigger `billing`."""
    return triggers(billing=to(target, options))
