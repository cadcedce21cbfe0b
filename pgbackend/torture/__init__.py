"""`pgbackend torture`: everything fails at once, and the promises are checked against what really happened.

Producers and workers run in processes of their own, each behind a proxy of its own. A plan, which follows from a seed
alone, kills, freezes and cuts them off, and restarts PostgreSQL. Each process notes what it did, the server notes who
committed which offset, and a process that takes no part notes when the machine stood still. When everything is settled,
these records are judged:

    plan ─▶ chaos ─▶ processes (producer, worker) ─▶ records ─▶ verdict ─▶ report
                 ├─▶ proxy, server                     ▲
                 ╰─▶ machine ──────────────────────────┤ when it stood still
                                         audit ────────╯ the server's own record

Each plan has an application that works meanwhile: see applications/. It is a user of `Backend` like any other and has
no private way into it. So a user can meet whatever it finds.
"""
