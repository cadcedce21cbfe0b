"""A configuration file is followed, however it changes."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from time import monotonic

import pytest

from pgbackend.facts import Recorder
from pgbackend.serve.config import watch
from pgbackend.serve.config.load import load_file
from pgbackend.serve.config.models import Configuration
from pgbackend.serve.config.reload import ConfigurationFile
from tests.serve.support.mounted import Mounted
from tests.serve.support.process import post, running
from tests.serve.support.target import Target
from tests.support.polling import eventually


def naming(*triggers: str, secret: str = "") -> str:
    """A configuration with these triggers."""
    headers = f", headers: {{X: {secret}}}" if secret else ""
    return "triggers:\n" + "".join(f"  {name}: {{target: {{url: http://h/{headers}}}}}\n" for name in triggers)


class Follower:
    """Collects the configurations that a file yields."""

    def __init__(self, file: ConfigurationFile) -> None:
        self._file = file
        self._found: asyncio.Queue[Configuration] = asyncio.Queue()

    async def run(self) -> None:
        async with aclosing(self._file.changes()) as changes:
            async for configuration in changes:
                self._found.put_nowait(configuration)

    async def next(self, timeout: float = 30.0) -> Configuration:
        async with asyncio.timeout(timeout):
            return await self._found.get()

    async def names(self, timeout: float = 30.0) -> list[str]:
        return list((await self.next(timeout)).triggers)

    @property
    def is_empty(self) -> bool:
        return self._found.empty()


@asynccontextmanager
async def following(path: Path, *, current: Configuration | None = None) -> AsyncIterator[Follower]:
    follower = Follower(ConfigurationFile(path, current or load_file(path)))
    task = asyncio.create_task(follower.run())
    try:
        yield follower
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "broker.yaml"
    path.write_text(naming("first"))
    return path


def rename_over(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.rename(file)


def write(file: Path, text: str) -> None:
    file.write_text(text)


def make_again(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text)


@pytest.mark.parametrize("change", [write, rename_over, make_again])
async def test_a_changed_file_is_read_within_a_second(file: Path, change: object) -> None:
    assert callable(change)
    took = []
    async with following(file) as follower:
        for number in range(4):
            change(file, naming(f"t{number}"))
            began = monotonic()
            assert await follower.names() == [f"t{number}"]
            took.append(monotonic() - began)
    # The fastest one: a busy machine may delay some of them.
    assert min(took) < 1.5


async def test_a_change_before_the_watch_began_is_seen(file: Path) -> None:
    current = load_file(file)
    file.write_text(naming("second"))
    async with following(file, current=current) as follower:
        assert await follower.names() == ["second"]


async def test_a_swapped_link_is_followed(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path / "etc", broker=naming("first"))
    took = []
    async with following(mounted.path("broker")) as follower:
        for number in range(4):
            mounted.swap(broker=naming(f"t{number}"))
            began = monotonic()
            assert await follower.names() == [f"t{number}"]
            took.append(monotonic() - began)
    assert min(took) < 1.5


async def test_every_link_on_the_way_to_the_file_is_followed(tmp_path: Path) -> None:
    """The link itself, a directory that is a link, and the file at the end."""
    for release in ("one", "two"):
        (tmp_path / "releases" / release).mkdir(parents=True)
        (tmp_path / "releases" / release / "broker.yaml").write_text(naming(release))
    (tmp_path / "current").symlink_to("releases/one")
    (tmp_path / "etc").mkdir()
    link = tmp_path / "etc" / "broker.yaml"
    link.symlink_to("../current/broker.yaml")
    async with following(link) as follower:
        (tmp_path / "new").symlink_to("releases/two")
        (tmp_path / "new").rename(tmp_path / "current")
        assert await follower.names() == ["two"]
        (tmp_path / "releases" / "two" / "broker.yaml").write_text(naming("three"))
        assert await follower.names() == ["three"]
        link.unlink()
        link.symlink_to("../releases/one/broker.yaml")
        assert await follower.names() == ["one"]


async def test_a_directory_that_is_created_again_is_followed(tmp_path: Path) -> None:
    directory = tmp_path / "etc"
    directory.mkdir()
    file = directory / "broker.yaml"
    file.write_text(naming("first"))
    with Recorder() as recorder:
        async with following(file) as follower:
            file.unlink()
            directory.rmdir()
            await recorder.wait("configuration refused", file=str(file))
            directory.mkdir()
            file.write_text(naming("second"))
            assert await follower.names() == ["second"]
            file.write_text(naming("third"))
            assert await follower.names() == ["third"]


async def test_a_rotated_secret_is_a_change(tmp_path: Path, file: Path) -> None:
    mounted = Mounted(tmp_path / "secrets", token="old")
    file.write_text(naming("first", secret="{file: secrets/token}"))
    took = []
    async with following(file) as follower:
        for secret in ("new", "newer", "newest"):
            mounted.swap(token=secret)
            began = monotonic()
            assert (await follower.next()).triggers["first"].target.headers == {"X": secret}
            took.append(monotonic() - began)
    assert min(took) < 1.5


async def test_secrets_of_a_new_configuration_are_followed(tmp_path: Path, file: Path) -> None:
    secret = tmp_path / "elsewhere" / "token"
    secret.parent.mkdir()
    secret.write_text("old")
    async with following(file) as follower:
        file.write_text(naming("first", secret=f"{{file: {secret}}}"))
        assert (await follower.next()).triggers["first"].target.headers == {"X": "old"}
        secret.write_text("new")
        assert (await follower.next()).triggers["first"].target.headers == {"X": "new"}


async def test_a_secret_that_appears_late_makes_the_configuration_valid(tmp_path: Path, file: Path) -> None:
    with Recorder() as recorder:
        async with following(file) as follower:
            file.write_text(naming("second", secret="{file: secrets/token}"))
            await recorder.wait("configuration refused")
            (tmp_path / "secrets").mkdir()
            (tmp_path / "secrets" / "token").write_text("here")
            assert await follower.names() == ["second"]


async def test_an_invalid_configuration_is_reported_and_changes_nothing(file: Path) -> None:
    with Recorder() as recorder:
        async with following(file) as follower:
            file.write_text("triggers: {a: {order: sorted}}")
            refused = await recorder.wait("configuration refused", file=str(file))
            assert str(refused["error"]).startswith(f"{file}:1: triggers.a.order: expected none, key or strict")
            file.write_text("")
            await recorder.wait("configuration refused", error=f"{file}: is empty: expected a mapping with `triggers`.")
            file.unlink()
            await recorder.wait("configuration refused", error=f"{file}: cannot be read: No such file or directory.")
            assert follower.is_empty
            file.write_text(naming("first"))
            await recorder.wait("configuration reloaded")
            assert follower.is_empty
            file.write_text(naming("second"))
            assert await follower.names() == ["second"]


async def test_a_file_larger_than_memory_is_reported_and_changes_nothing(file: Path) -> None:
    with Recorder() as recorder:
        async with following(file) as follower:
            os.truncate(file, 1 << 42)
            fact = await recorder.wait("configuration refused")
            assert "too large: expected at most 8 MiB" in str(fact["error"])
            rename_over(file, naming("second"))
            assert await follower.names() == ["second"]


def test_the_same_mistake_is_reported_once(file: Path) -> None:
    in_force = ConfigurationFile(file, load_file(file))
    with Recorder() as recorder:
        for text in ("triggers: []", "triggers: []", "triggers: [] # still", "triggers: x", "triggers: []"):
            file.write_text(text)
            assert not in_force.accept(in_force.read())
    assert [str(fact["error"]).rpartition(" ")[2] for fact in recorder.all("configuration refused")] == [
        "list.",
        '"x".',
        "list.",
    ]


def test_a_file_that_says_the_same_in_other_words_is_no_change(file: Path) -> None:
    in_force = ConfigurationFile(file, load_file(file))
    with Recorder() as recorder:
        for text in (
            naming("first"),
            "# a comment\n" + naming("first"),
            '{"Triggers": {"first": {"target": {"url": "http://h/"}}}}',
        ):
            file.write_text(text)
            assert not in_force.accept(in_force.read())
        file.write_text(naming("second"))
        assert in_force.accept(in_force.read())
        assert not in_force.accept(in_force.read())
    assert not recorder.facts


async def test_a_file_is_not_read_while_it_is_being_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of an unfinished file is discarded, although every part of it is valid."""
    monkeypatch.setattr(watch, "_MOMENT", 0.01)
    lines = [f"  t{number}: {{}}\n" for number in range(10)]
    file.write_text("triggers:\n")

    def read() -> list[str]:
        configuration = load_file(file)
        if lines:
            with file.open("a") as writing:
                writing.write(lines.pop(0))
        return list(configuration.triggers)

    async with aclosing(watch.changes(read, lambda: [file])) as reads:
        assert await anext(reads) == [f"t{number}" for number in range(10)]


async def test_files_are_read_again_only_when_their_contents_change(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "tls" / "second"
    second.parent.mkdir()
    first.write_text("a")
    second.write_text("b")
    files = (first, second)
    known = watch.digests(files)
    async with aclosing(
        watch.changes(lambda: [file.read_text() for file in files], lambda: files, known=known)
    ) as reads:
        os.utime(first)
        rename_over(second, "c")
        assert await anext(reads) == ["a", "c"]
        rename_over(first, "a")
        rename_over(second, "d")
        assert await anext(reads) == ["a", "d"]


async def test_without_watches_a_change_takes_a_second(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def awatch(*paths: object, **options: object) -> AsyncIterator[None]:
        if paths:
            raise RuntimeError("inotify: no space left")
        yield

    monkeypatch.setattr(watch, "awatch", awatch)
    with Recorder() as recorder:
        async with following(file) as follower:
            await recorder.wait("files not watched")
            file.write_text(naming("second"))
            assert await follower.names() == ["second"]
            file.write_text(naming("third"))
            assert await follower.names() == ["third"]
    assert len(recorder.all("files not watched")) == 1


class TestOfABroker:
    """The same with a whole broker."""

    async def test_rotated_secrets_apply_to_senders_and_targets(
        self, database: str, target: Target, tmp_path: Path
    ) -> None:
        secrets = Mounted(tmp_path / "secrets", token="old-token", key="old-key")
        file = tmp_path / "broker.yaml"
        file.write_text(
            f"ingest: {{token: {{file: secrets/token}}}}\n"
            f"triggers: {{a: {{target: {{url: '{target.url}', headers: {{X-Key: {{file: secrets/key}}}}}}}}}}\n"
        )
        async with running("--dsn", database, "--port", "0", "--config", str(file)) as serve:
            url = await serve.listening()
            assert await post(url, token="old-token") == 202
            await target.wait(1)
            secrets.swap(token="new-token", key="new-key")

            async def in_force() -> bool:
                return await post(url, token="new-token") == 202

            await eventually("the new token lets in", in_force)
            assert await post(url, token="old-token") == 401
            await target.wait(2)
        assert [request.header("x-key") for request in target.requests] == ["old-key", "new-key"]

    async def test_a_refused_file_changes_nothing_and_is_reported_with_every_mistake(
        self, database: str, target: Target, tmp_path: Path
    ) -> None:
        file = tmp_path / "broker.yaml"
        body = f"target: {{url: '{target.url}'}}"
        file.write_text(f"triggers: {{a: {{{body}, shards: 2}}}}")
        async with running("--dsn", database, "--port", "0", "--config", str(file)) as serve:
            url = await serve.listening()
            file.write_text(f"triggers:\n  a: {{{body}, order: x}}\n  b: {{url: x}}\n")
            [refused] = await serve.complains("configuration refused")
            assert "broker.yaml:2: triggers.a.order" in refused
            assert "broker.yaml:3: triggers.b.url" in refused
            assert await post(url) == 202
            await target.wait(1)
            file.write_text(f"triggers: {{b: {{{body}}}, a: {{{body}, shards: 2}}}}")

            async def both() -> bool:
                before = len(target.requests)
                assert await post(url) == 202
                await target.wait(before + 1)
                return len(target.requests) > before + 1

            await eventually("both triggers deliver", both)
