"""`python -m pgbackend` is the command `pgbackend`."""

from pgbackend.cli import main

if __name__ == "__main__":
    main(prog_name="pgbackend")
