"""The pages whose Python and SQL run on a log, and the tables that they expect."""

PROGRAMS = {
    "docs/console.md": "",
    "docs/errors.md": "",
    "docs/operations.md": "",
    "docs/producing.md": "CREATE TABLE orders (id int PRIMARY KEY)",
    "docs/redact.md": "",
    "docs/retention.md": "",
    "docs/steering.md": "",
    "docs/subscribing.md": """
        CREATE TABLE accounts (id int PRIMARY KEY, balance int);
        INSERT INTO accounts VALUES (1, 100), (2, 0);
    """,
}
