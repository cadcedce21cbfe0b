"""Pages that are not the console's: for what a misbehaving or a hostile page does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def site(html: str, *, policy: str | None = None) -> AsyncIterator[str]:
    """The URL of a page with this content security policy."""
    application = web.Application()
    headers = {} if policy is None else {"Content-Security-Policy": policy}

    async def answer(request: web.Request) -> web.Response:
        if request.path != "/":
            return web.Response(status=204 if request.path == "/favicon.ico" else 404)
        return web.Response(text=html, content_type="text/html", headers=headers)

    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()
