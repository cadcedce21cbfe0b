"""The broker behind `pgbackend serve`: CloudEvents over HTTP in, triggers from a file, HTTP delivery out.

It is a user of `Backend` like any other and needs nothing private of it. `config` reads the file, `operations` logs,
measures and traces, `ingest` takes events in, `egress` delivers them, `app` puts them together, and `supervisor` runs
several broker processes. Imports go in that order.
"""
