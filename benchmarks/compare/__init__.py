"""pgbackend beside its peers: the same events, the same machine, one run. `python -m benchmarks.compare --help`."""
