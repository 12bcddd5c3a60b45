"""A service with three leaks of its own, which the radar finds: each holds requests.

``python three_leaks.py`` serves it: ask for ``/visits``, ``/report/1`` and ``/mail``.
"""

import asyncio

from aiohttp import web

from aiohttp_cyclebreak import Radar, setup

visits = []


async def count_visit(request):
    visits.append(request)  # only its number is needed
    return web.json_response({"visits": len(visits)})


def make_report():
    cache = {}

    async def report(request):
        number = request.match_info["number"]
        if number not in cache:
            # What is kept for later calls has the whole request with it.
            cache[number] = lambda: f"report {request.match_info['number']}"
        return web.Response(text=cache[number]())

    return report


async def send_mail(request):
    await asyncio.Event().wait()  # the answer of a mail server that never comes
    print("sent for", request.path)


def make_mail():
    running = set()

    async def mail(request):
        running.add(asyncio.create_task(send_mail(request)))
        return web.Response(text="it will be sent")

    return mail


def create_app(radar=None):
    app = web.Application()
    setup(app, radar=radar or Radar())
    app.router.add_get("/visits", count_visit)
    app.router.add_get("/report/{number}", make_report())
    app.router.add_get("/mail", make_mail())
    return app


if __name__ == "__main__":
    radar = Radar(max_age=5.0, interval=1.0, report_every=5.0)
    web.run_app(create_app(radar), host="127.0.0.1")
