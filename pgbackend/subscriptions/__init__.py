"""Subscriptions as they stand in the database, and which worker runs which shard."""
