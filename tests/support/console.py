"""A console behind a real socket, and a client that asks as its page does."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvicorn
from multidict import CIMultiDict
from yarl import URL

from tests.support.polling import eventually

PAGE = {"X-Pgbackend-Console": "1", "Content-Type": "application/json"}
"""The headers that the console's page sends with a POST."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer that a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    json: Any
    """The body, if it is JSON."""

    @property
    def detail(self) -> str:
        """The detail of a problem."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.json["status"] == self.status
        return str(self.json["detail"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Asks a console at `url`."""

    session: aiohttp.ClientSession
    url: str

    async def ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | list[tuple[str, str]] | None = None,
        **options: Any,
    ) -> Answer:
        """The answer to a request; `path` is sent as it is."""
        target = URL(self.url + path, encoded=True)
        async with self.session.request(
            method, target, headers=CIMultiDict(headers or {}), allow_redirects=False, **options
        ) as response:
            body = await response.read()
            is_json = response.content_type.endswith("json") and body
            return Answer(
                status=response.status,
                headers=response.headers,
                body=body,
                json=await response.json(content_type=None) if is_json else None,
            )

    async def get(self, path: str, **headers: str) -> Any:
        """What the API answers; the request succeeds."""
        answer = await self.ask("GET", f"api/{path}", headers=headers)
        assert answer.status == 200, answer.body
        return answer.json

    async def post(self, path: str, body: object, headers: Mapping[str, str] = PAGE) -> Answer:
        """The answer to a POST of the page."""
        return await self.ask("POST", f"api/{path}", headers=headers, json=body)

    async def act(self, path: str, body: object) -> Any:
        """What an action or a preview answers; it succeeds."""
        answer = await self.post(path, body)
        assert answer.status == 200, answer.body
        return answer.json


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[Client]:
    """A client of the console at `url`, which ends with a slash."""
    async with aiohttp.ClientSession() as session:
        yield Client(session=session, url=url)


@asynccontextmanager
async def served(application: Any, path: str = "/", host: str = "127.0.0.1") -> AsyncIterator[Client]:
    """A client of an application that uvicorn serves; `path` is that of the console in it."""
    with socket.create_server((host, 0)) as bound:
        port = bound.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(application, log_level="error", lifespan="off", ws="none", access_log=False)
        )
        task = asyncio.create_task(server.serve([bound]), name="serve the console")
        try:
            await eventually("uvicorn serves", lambda: server.started)
            async with asking(f"http://{host}:{port}{path}") as client:
                yield client
        finally:
            server.should_exit = True
            await task
