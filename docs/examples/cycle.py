"""What a reference cycle is, and what it is not: run it."""

import gc
import weakref


class Body:
    """Stands for a request with its body."""


def fail():
    body = Body()  # a local of this frame
    try:
        raise ValueError(weakref.ref(body))
    except ValueError as exc:
        error = exc  # and so is this: exception -> traceback -> frame -> exception
    return error.args[0]


gc.disable()
body = fail()
print("after the function has returned:", "alive" if body() else "gone")
gc.collect()
print("after a collection:", "alive" if body() else "gone")
