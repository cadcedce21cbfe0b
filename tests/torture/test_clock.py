"""The wall clock of a process jumps. All code in it sees the jump, and no other clock moves."""

import json
import subprocess
import sys
from pathlib import Path

from pgbackend.torture import clock

PROGRAM = """
import json, time
from datetime import UTC, datetime
from time import monotonic, time as now
from pgbackend.torture import clock

before = [now(), datetime.now(UTC).timestamp(), time.time_ns() / 1e9, monotonic()]
clock.jump(86_400)
after = [now(), datetime.now(UTC).timestamp(), time.time_ns() / 1e9, monotonic()]
print(json.dumps([b - a for a, b in zip(before, after)]))

# C extensions make datetimes of the real class.
real = datetime.__mro__[1](2026, 1, 1)
assert type(real) is not datetime
assert isinstance(real, datetime) and isinstance(real, int | datetime)
"""


def test_a_jump_moves_every_way_to_tell_the_time_but_the_monotonic_clock(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    output = subprocess.run(
        [sys.executable, "-P", str(Path(clock.__file__)), str(program)], check=True, capture_output=True, text=True
    ).stdout
    *wall, monotonic = json.loads(output)
    assert all(86_390 < jump < 86_460 for jump in wall)
    assert monotonic < 60
