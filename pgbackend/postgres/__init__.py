"""All that talks to PostgreSQL: connections, statements, tables."""
