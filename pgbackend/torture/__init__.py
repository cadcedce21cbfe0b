"""`pgbackend torture`: everything goes wrong at once, and the promises are held against what really happened.

Producers and workers run in processes of their own, each behind a proxy of its own. A plan, which follows from a seed
alone, kills, freezes and cuts them off, and restarts PostgreSQL beneath them. Each process writes down what it did, and
the server who committed which offset; when everything has come to rest, a verdict is passed on these records:

    plan ─▶ chaos ─▶ processes (producer, worker) ─▶ records ─▶ verdict ─▶ report
                 ╰─▶ proxy, server                     ▲
                                     evidence ─────────╯ what the server says of its own accord

It is a user of `Backend` like any other, with no private door into it: what it finds, a user would have met.
"""
