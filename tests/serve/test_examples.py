"""The examples run."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from pgbackend.serve.config.load import load_file
from tests.support.ports import unasked_port

EXAMPLES = Path(__file__).parents[2] / "examples"


async def run(*args: str, timeout: float = 90.0) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *args, cwd=EXAMPLES.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(timeout):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
async def test_the_demo_delivers_everything_it_sends() -> None:
    code, out, err = await run("examples/demo.py")
    assert (code, err) == (0, "")
    assert out.count("sent in ") == 3
    assert out.count("arrived at /audit (structured)") == 4
    assert out.count("arrived at /billing (binary)") == 3


def test_the_example_configuration_is_valid() -> None:
    assert str(load_file(EXAMPLES / "broker.yaml").triggers["everything"].target.url) == "http://127.0.0.1:8888/"


async def test_the_receiver_ends_with_its_command_and_its_exit_code() -> None:
    port = unasked_port()
    post = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], b'hello', {'ce-type': 't'})); sys.exit(7)"
    url = f"http://127.0.0.1:{port}/x"
    code, out, _ = await run("examples/receiver.py", "--port", str(port), "--", sys.executable, "-c", post, url)
    assert code == 7
    assert out == "arrived at /x (binary): t id=? source=? hello\n"


async def test_the_receiver_reports_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = await run("examples/receiver.py", "--port", str(port), "--", "true")
    assert code == 1
    assert err == f"Error: the receiver cannot listen on port {port}: Address already in use.\n"
