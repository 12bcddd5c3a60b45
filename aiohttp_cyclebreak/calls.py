"""What have outgoing calls given? By weak reference: it holds nothing alive."""

from contextvars import ContextVar
from itertools import count, islice
from typing import Any, Dict, List, Optional
from weakref import ref

from aiohttp import web

from .exceptions import frames_of, graph, leads_to, traceback_of
from .holders import Watching
from .internals import error_of_call, error_of_released
from .options import Options
from .tracebacks import is_all_empty, looked_at, mark_looked_at

__all__ = ("Calls", "Serving", "are_followed", "current", "follow", "serving_of")

_FEWEST = 32  # that come before the dead are dropped
_MOST_ENTRIES = 200  # in the traceback of what all released responses raise

# In which order calls are followed, and what all released responses raise is looked at.
_numbers = count(1)


class Calls:
    """The responses and websockets of the calls of one request, or of one task.

    Adding one is on the path of every call that succeeds: that is a weak reference
    and an entry of a dictionary.  Most of what is followed is gone before the next
    call, and what is dead is dropped whenever 32 more have come, or a quarter more.
    """

    __slots__ = ("_followed", "_limit", "_number")

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._followed: Dict[int, ref[Any]] = {}
        self._limit = _FEWEST

    def add(self, each: Any) -> bool:
        """Follow a response or a websocket of the client's.

        Returns:
            Whether it is time to look for errors: now and then.
        """
        followed = self._followed
        followed[id(each)] = ref(each)
        if len(followed) < self._limit:
            return False
        self.forget_dead()
        return True

    def forget_dead(self) -> None:
        """Drop what is gone."""
        for key, found in list(self._followed.items()):
            if found() is None:
                del self._followed[key]
        alive = len(self._followed)
        self._limit = alive + max(_FEWEST, alive // 4)

    def errors(self) -> List[BaseException]:
        """The exceptions that those which are still there keep, if they keep frames."""
        errors: List[BaseException] = []
        for found in list(self._followed.values()):
            each = found()
            if each is None:
                continue
            error = error_of_call(each)
            # Each connection that ends is given one, which most often nobody raises.
            if error is not None and any(map(traceback_of, graph(error))):
                errors.append(error)
        # A response that had all come with its headers is not followed.
        released = error_of_released()
        if (
            released is not None
            and not is_all_empty(released)
            and not self._has_begun_later(released)
        ):
            mark_looked_at(released, next(_numbers))
            if self._is_to_sever(released):
                errors.append(released)
        return errors

    def _has_begun_later(self, released: BaseException) -> bool:
        """Whether what all released responses raise was raised last before all this.

        A worker may wait for days after that, and each request would look through it.
        """
        return 0 < looked_at(released) < self._number

    def _is_to_sever(self, released: BaseException) -> bool:
        """Whether what all released responses raise has been raised very often.

        Before that it is left to who has raised it, and may have it in hand.
        """
        return next(islice(frames_of(released), _MOST_ENTRIES, None), None) is not None

    def unread(self) -> bool:
        """Whether a response is there whose body has not all come yet."""
        for found in list(self._followed.values()):
            content = getattr(found(), "content", None)
            if content is not None and not content.is_eof():
                return True
        return False


class Serving(Calls):
    """The outgoing calls of one request, as its handlers and their tasks see it."""

    __slots__ = ("options", "over", "request")

    def __init__(self, request: web.BaseRequest, options: Options) -> None:
        super().__init__()
        self.options = [options]
        self.over = False  # tasks that outlive the request are on their own
        # Weakly: every task that a handler starts has this in its context, for as long
        # as it runs.
        self.request = Watching(request)

    def _is_to_sever(self, released: BaseException) -> bool:
        request = self.request()
        return super()._is_to_sever(released) or (
            request is not None and leads_to(released, request)
        )


# Whether any client session asks for it.
are_followed = False
current: "ContextVar[Optional[Serving]]" = ContextVar("current", default=None)


def follow() -> None:
    """Follow outgoing calls from now on; until then they cost a request nothing."""
    global are_followed
    are_followed = True


def serving_of(request: web.BaseRequest) -> Optional[Serving]:
    """The calls of a request that what runs now serves, if they are followed."""
    serving = current.get()
    if serving is None or serving.request() is not request:
        return None
    return serving
