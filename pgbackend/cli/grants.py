"""`pgbackend grants`: prints the SQL that gives roles exactly the rights that they need on the log."""

import click

from pgbackend.postgres import grants as privileges


@click.command()
@click.option(
    "--producer", "producers", metavar="ROLE", multiple=True, help="A role that appends, by pgbackend or in plain SQL."
)
@click.option("--consumer", "consumers", metavar="ROLE", multiple=True, help="A role that runs subscriptions.")
@click.option("--reader", "readers", metavar="ROLE", multiple=True, help="A role that follows and exports the log.")
@click.option(
    "--operator", "operators", metavar="ROLE", multiple=True,
    help="A role that looks at the log, changes subscriptions, redelivers and purges dead letters.",
)  # fmt: skip
@click.option(
    "--schema", envvar="PGBACKEND_SCHEMA", default="pgbackend", show_default=True, show_envvar=True,
    help="The schema that holds the log.",
)  # fmt: skip
def grants(
    *,
    producers: tuple[str, ...],
    consumers: tuple[str, ...],
    readers: tuple[str, ...],
    operators: tuple[str, ...],
    schema: str,
) -> None:
    """Print the SQL that gives existing roles exactly the rights that they need on the log. Needs no database.

    Each option can be given several times, and a role can be of several kinds: a broker is a producer and a consumer.
    Run the SQL as the owner of the log's tables, and again after each update of pgbackend that has a migration:

    pgbackend grants --producer shop --consumer billing | psql -v ON_ERROR_STOP=1 …
    """
    if not (producers or consumers or readers or operators):
        raise click.UsageError("Name at least one role with --producer, --consumer, --reader or --operator.")
    click.echo(
        privileges.grants(schema, producers=producers, consumers=consumers, readers=readers, operators=operators)
    )
