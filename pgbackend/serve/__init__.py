"""The broker behind `pgbackend serve`: CloudEvents over HTTP in, triggers from a file, HTTP delivery out.

A user of `Backend` like any other, with no private door. `app` wires it: `config` says what the file means and
`reload` follows it, `ingest` takes events in behind `listener` and its `connection`s, `triggers` keeps subscriptions as
the configuration wants them, `delivery` sends.
"""
