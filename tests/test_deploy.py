"""The files in deploy/ fit the command line. They run in neither containers nor systemd here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import yaml
from click.testing import CliRunner

from pgbackend import Backend
from pgbackend.cli import main
from pgbackend.cli.serve import serve
from pgbackend.postgres import schema
from pgbackend.postgres.pool import Database
from pgbackend.serve import supervisor
from pgbackend.serve.config.load import load_file
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.programs import programs

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "pgbackend.service").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())

KNOWN = {option.envvar for option in serve.params}


def _instructions(name: str) -> Iterator[str]:
    whole = DOCKERFILE.replace("\\\n", " ")
    for line in whole.splitlines():
        if line.startswith(name + " "):
            yield line.removeprefix(name).strip()


def _unit(key: str) -> list[str]:
    return [value for line in UNIT.splitlines() for name, _, value in [line.partition("=")] if name == key]


@pytest.mark.parametrize(
    "file", sorted(path for path in DEPLOY.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_every_variable_is_an_option_of_serve(file: Path) -> None:
    assert set(re.findall(r"\bPGBACKEND_[A-Z_]+", file.read_text())) <= KNOWN


def test_the_commands_are_valid() -> None:
    [entry], [command] = _instructions("ENTRYPOINT"), _instructions("CMD")
    assert json.loads(entry) + json.loads(command) == ["pgbackend", "serve"]
    [started] = _unit("ExecStart")
    program, *arguments = started.split()
    assert program == "/opt/pgbackend/bin/pgbackend"
    assert arguments[0] == "serve"
    serve.make_parser(serve.make_context("serve", arguments[1:])).parse_args(arguments[1:])


def test_the_image_copies_files_that_exist_and_that_docker_may_see() -> None:
    allowed = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = [source for line in _instructions("COPY") if "--from" not in line for source in line.split()[:-1]]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / source).exists() for source in copied)
    # The files that pyproject.toml needs for the wheel.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"]
    assert {*needed, *project["project"]["license-files"]} <= set(copied)
    [extras] = re.findall(r"\.whl\)\[(\S+)\]", DOCKERFILE)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    minor = int(re.findall(r"^ARG PYTHON=3\.(\d+)-slim@", DOCKERFILE, re.MULTILINE)[0])
    assert f"Programming Language :: Python :: 3.{minor}" in project["project"]["classifiers"]


def test_the_health_check_asks_the_right_port() -> None:
    [check] = re.findall(r"CMD (\[\"python\".*\])", DOCKERFILE)
    program, flag, code = json.loads(check)
    assert (program, flag) == ("python", "-c")
    assert "/healthz" in code
    asked = []
    link = "tcp://10.0.171.239:8080"  # Kubernetes sets this for a Service called `pgbackend`
    for port, admin in ((None, None), ("9090", None), (link, None), ("9090", "9091"), (link, "9091"), ("9090", link)):
        given = {"PGBACKEND_PORT": port, "PGBACKEND_ADMIN_PORT": admin}
        environment = {name: value for name, value in given.items() if value is not None}
        with patch.dict("os.environ", environment, clear=True), patch("urllib.request.urlopen") as urlopen:
            exec(compile(code, "HEALTHCHECK", "exec"), {})  # noqa: S102 - our own
        asked.append(urlopen.call_args.args[0])
    assert asked == [f"http://127.0.0.1:{port}/healthz" for port in (8080, 9090, 8080, 9091, 9091, 9090)]


def test_the_composition_mounts_a_valid_configuration() -> None:
    broker = COMPOSE["services"]["broker"]
    [mount] = broker["volumes"]
    source, target, mode = mount.split(":")
    assert mode == "ro"
    inside = Path(broker["environment"]["PGBACKEND_CONFIG_FILE"])
    assert load_file(DEPLOY / source / inside.relative_to(target)).triggers
    assert (ROOT / "deploy" / broker["build"]["context"]).resolve() == ROOT
    assert (ROOT / broker["build"]["dockerfile"]).is_file()
    assert broker["depends_on"].keys() < COMPOSE["services"].keys()


@pytest.mark.direct
async def test_the_composition_s_broker_owns_nothing_and_works(empty_database: str, tmp_path: Path) -> None:
    services = COMPOSE["services"]
    secrets = {"OWNER_PASSWORD": "own'er", "BROKER_PASSWORD": 'bro"ker'}
    assert set(secrets) < set(services["postgres"]["environment"])
    assert "./roles.sql:/docker-entrypoint-initdb.d/roles.sql:ro" in services["postgres"]["volumes"]
    order = {name: service.get("depends_on", {}).keys() for name, service in services.items()}
    assert order == {
        "postgres": set(),
        "migrate": {"postgres"},
        "grants": {"migrate"},
        "broker": {"postgres", "grants"},
    }

    def dsn(service: str) -> str:
        given = services[service]
        url = urlsplit(given["environment"].get("PGBACKEND_DSN") or given["command"][0])
        password = secrets[given["environment"]["PGPASSWORD"].strip("${}")]
        own = urlsplit(empty_database)
        netloc = f"{url.username}:{quote(password)}@{own.netloc.rpartition('@')[2]}"
        return own._replace(netloc=netloc).geturl()

    def psql(*arguments: str) -> None:
        command = [str(programs() / "psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **secrets})

    owner = await asyncpg.connect(empty_database)
    try:
        psql(f"--file={DEPLOY / 'roles.sql'}", empty_database)
        try:
            await schema.migrate(Database(dsn("migrate")).connect, "pgbackend")
            [script] = services["migrate"]["command"]
            [granted] = re.findall(r"pgbackend (grants [^>]+) > /grants/grants.sql", script)
            printed = CliRunner().invoke(main, shlex.split(granted), catch_exceptions=False).stdout
            (tmp_path / "grants.sql").write_text(printed)
            psql(f"--file={tmp_path / 'grants.sql'}", dsn("grants"))

            caught = Catch()
            async with Backend(dsn("broker")) as backend:
                await backend.subscribe("everything", caught)
                await backend.produce(make_event("one"))
                await caught.has("one")
                await backend.probe()
            assert not await owner.fetchval(
                "SELECT rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname = 'pgbackend_broker'"
            )
            assert not await owner.fetchval(
                "SELECT count(*) FROM pg_class WHERE relowner = 'pgbackend_broker'::regrole"
            )
        finally:
            await owner.execute("DROP OWNED BY pgbackend_owner, pgbackend_broker CASCADE")
            await owner.execute("DROP ROLE pgbackend_owner, pgbackend_broker")
    finally:
        await owner.close()


def test_every_image_is_pinned_by_its_digest() -> None:
    bases = [line.split()[0] for line in _instructions("FROM")]
    [python] = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    images = [base.replace("${PYTHON}", python) for base in bases]
    images += [service["image"] for service in COMPOSE["services"].values() if "build" not in service]
    assert "# syntax=" not in DOCKERFILE
    for image in images:
        assert re.fullmatch(r"\w+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_the_broker_gets_enough_time_to_drain() -> None:
    assert int(_unit("TimeoutStopSec")[0]) > supervisor.DRAIN_TIMEOUT
    assert int(COMPOSE["services"]["broker"]["stop_grace_period"].rstrip("s")) > supervisor.DRAIN_TIMEOUT
    assert _unit("KillMode") == ["mixed"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "pgbackend.service"
    unit.write_text(UNIT.replace("/opt/pgbackend/bin/pgbackend", sys.executable))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_nothing_in_it_is_a_secret() -> None:
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            assert "PASSWORD" not in name or value.startswith("${")
    assert not any(fnmatch(path.name, ".env*") for path in DEPLOY.iterdir())
