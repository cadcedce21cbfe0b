"""The systems that are compared, by the names that `--systems` takes."""

import importlib
from typing import Final

from benchmarks.compare.system import CompareError, System

NAMES: Final = {
    "bare": ("bare", "Bare"),
    "pgbackend": ("ours", "JsonEvents"),
    "pgbackend-sdk": ("ours", "SdkEvents"),
    "pgq": ("pgq", "PgQ"),
    "pgqueuer": ("pgqueuer", "PgQueuerJobs"),
    "procrastinate": ("procrastinate", "ProcrastinateJobs"),
    "awa": ("awa", "AwaJobs"),
    "redis": ("redis_streams", "RedisStreams"),
    "nats": ("jetstream", "JetStream"),
}


def load(name: str) -> System:
    """The system of this name. Raises CompareError when its client is not installed."""
    module, cls = NAMES[name]
    try:
        system: System = getattr(importlib.import_module(f"{__name__}.{module}"), cls)()
    except ImportError as error:
        raise CompareError(f"the package {error.name} is missing: pip install '.[bench]'") from error
    return system
