"""Are requests left behind? To be asked of a process that runs, without any library."""

import gc

from aiohttp import web


def requests_alive() -> int:
    return sum(web.BaseRequest in type(each).__mro__ for each in gc.get_objects())


async def count(request: web.Request) -> web.Response:
    """For an address that nobody else can reach: it stops all other requests."""
    before = requests_alive()
    gc.collect()
    return web.json_response({"before": before, "after": requests_alive()})
