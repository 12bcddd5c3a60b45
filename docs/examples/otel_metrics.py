"""The numbers of an application as OpenTelemetry metrics."""

from opentelemetry.metrics import Observation

from aiohttp_cyclebreak import stats


def observe(app, meter):
    """Give a meter the numbers of an application, whenever it asks for them."""

    def alive(options):
        yield Observation(stats(app).alive)

    def overdue(options):
        for route, number in stats(app).overdue.items():
            yield Observation(number, {"http.route": route})

    def severed(options):
        for (route, exception), number in stats(app).severed.items():
            attributes = {"http.route": route, "exception.type": exception}
            yield Observation(number, attributes)

    def errors(options):
        yield Observation(stats(app).errors)

    name = "aiohttp_cyclebreak."
    meter.create_observable_up_down_counter(name + "requests.alive", [alive])
    meter.create_observable_up_down_counter(name + "requests.overdue", [overdue])
    meter.create_observable_counter(name + "severed", [severed])
    meter.create_observable_counter(name + "errors", [errors])
