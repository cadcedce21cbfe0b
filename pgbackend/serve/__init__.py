"""The broker behind `pgbackend serve`: CloudEvents over HTTP in, triggers from a file, HTTP delivery out.

It uses only the public interface of `Backend`. Its parts, in the order of their imports:

- `config` reads the configuration file, `options` holds the command line's options, `process` handles signals
- `operations` logs, measures and traces
- `ingest` accepts events, `egress` dispatches them to targets
- `reloader` applies changed files, `announcement` tells people that the broker serves
- `broker` starts and drains the parts of one process in order, `app` puts them together
- `supervisor` runs several such processes
"""
