"""A PostgreSQL of one's own."""
