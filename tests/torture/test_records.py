"""Notes stay on file, line by line, in the order of time, whichever process is killed."""

import signal
import subprocess
import sys
from pathlib import Path

from pgbackend.torture.records import Notes, merge, read

ENDLESS = """
import sys
from pathlib import Path
from pgbackend.torture.records import Notes
notes = Notes(Path(sys.argv[1]), "a")
number = 0
while True:
    notes.note("n", number)
    number += 1
    if number == 1000:
        print("many", flush=True)
"""


def test_notes_of_all_places_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    one, two = Notes(tmp_path, "one"), Notes(tmp_path, "two")
    for number in range(10):
        (one if number % 3 else two).note("n", number, "x")
    one.close()
    two.close()
    assert [(note.kind, note.fields) for note in merge(tmp_path, ["one", "two", "never"])] == [
        ("n", [str(number), "x"]) for number in range(10)
    ]


def test_a_line_that_a_kill_cut_short_is_skipped_and_the_next_process_starts_a_new_one(tmp_path: Path) -> None:
    first = Notes(tmp_path, "a")
    first.note("n", 1)
    first.close()
    with (tmp_path / "a.notes").open("a") as file:
        file.write("4711 n 12")
    second = Notes(tmp_path, "a")
    second.note("n", 2)
    second.close()
    assert [note.fields for note in read(tmp_path, "a")] == [["1"], ["2"]]


def test_notes_from_before_a_kill_are_there(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"many\n"
        process.send_signal(signal.SIGKILL)
    numbers = [int(note.fields[0]) for note in read(tmp_path, "a")]
    assert len(numbers) >= 1000
    assert numbers == list(range(len(numbers)))
