"""Tables of the options of every command, for the documentation site: from the commands themselves."""

from collections.abc import Iterator

import click

from pgbackend.cli import main

_SHARED = ("dsn", "listen_dsn", "schema", "data_dir")
"""The options that lead to a log. Most commands have them, so the site lists them once."""


def tables() -> str:
    """A table for the options that lead to a log, then one for each command with options of its own."""
    commands = list(_commands(main, "pgbackend"))
    shared = next(command for path, command in commands if path == "pgbackend status")
    sections = [_section("Options that lead to a log", "pgbackend status", shared, only_shared=True)]
    sections += [_section(f"`{path}`", path, command) for path, command in commands]
    return "\n".join(section for section in sections if section)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif command is not None:
            yield f"{path} {name}", command


def _section(title: str, path: str, command: click.Command, *, only_shared: bool = False) -> str:
    options = [one for one in command.params if isinstance(one, click.Option) and (one.name in _SHARED) == only_shared]
    if not options:
        return ""
    rows = "".join(_row(path, option) for option in options)
    return f"### {title}\n\n| option | variable | default | meaning |\n|---|---|---|---|\n{rows}"


def _row(path: str, option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = option.to_info_dict()["default"]
    default = "" if option.is_flag or value is None else f"`{value}`"
    meaning = (option.help or "").replace("|", "\\|")
    return f"| {names} | {_variable(path, option)} | {default} | {meaning} |\n"


def _variable(path: str, option: click.Option) -> str:
    if option.envvar:
        return f"`{option.envvar}`"
    if not option.allow_from_autoenv:
        return ""
    return "`" + "_".join([*path.split(), option.name or ""]).replace("-", "_").upper() + "`"
