"""Claiming without a worker that looks for its share."""

from pgbackend.subscriptions.leases import Lease, Leases


async def claim_free(leases: Leases, *subscriptions: str) -> list[Lease]:
    """Claim every shard of these subscriptions that is free by now."""
    survey = await leases.survey()
    return await leases.claim([shard.key for shard in survey.shards if shard.free and shard.key[0] in subscriptions])
