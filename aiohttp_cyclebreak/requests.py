"""When is a request done? Follows it to the end of its task."""

import asyncio
from collections import Counter
from contextvars import Context
from functools import partial
from sys import getrefcount
from typing import Any, Container, Dict, Iterable, List, Optional, Type, Union, cast
from weakref import getweakrefs, ref

from aiohttp import hdrs, web

from . import internals
from .calls import Serving
from .complaints import ENDS, complain, logger
from .connections import Connection, clear_request_frame, unread_has_come
from .counts import canonical_path
from .exceptions import (
    attributes_of,
    detach,
    frames_of,
    goes_by_itself,
    graph,
    leads_to,
)
from .frames import (
    COUNTS_ARE_EXACT,
    Emptied,
    empty,
    empty_functions,
    empty_with_callers,
    local_values,
)
from .holders import (
    FIRST_PAUSE,
    MOST_NOTED,
    Holder,
    InUse,
    SortedOut,
    Watching,
    leave,
    look_into,
    somebody_has,
    sort_out,
)
from .internals import HANDLE_REQUEST
from .options import BodyReleasedError, BreakEvent, Options
from .sever import Cut, sever

__all__ = ("FOLLOWED", "Asked", "FollowedRequest")

# Where a request has what follows it, beside its own attributes.
FOLLOWED = "_cyclebreak"

# How many references sys.getrefcount() gives for the __dict__ of an object, here the
# logger, if nobody else has that dict.
_UNSHARED_DICT = getrefcount(logger.__dict__)


def _name(function: Any) -> str:
    """Say which function it is, without asking it: its repr may fail, or tell."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _end_once_told(
    owner: "Union[FollowedRequest, Asked]", task: "asyncio.Future[Any]"
) -> None:
    # No variable may hold the request here: its references are counted further down.
    if internals.is_awaited(owner.request, task):
        # A task that was started eagerly calls this before it wakes the connection's
        # task, which may log the exception then.
        context = internals.context_of(task)
        task.get_loop().call_soon(owner.end, task, context=context)
    else:
        owner.end(task)


def _alive(
    references: "Iterable[ref[asyncio.Task[Any]]]",
) -> "List[asyncio.Task[Any]]":
    tasks = [found() for found in references]
    return [task for task in tasks if task is not None]


class FollowedRequest(Holder):
    """A request that is followed to the end of its task."""

    __slots__ = (
        "request",
        "options",
        "are_default",
        "releases_body",
        "connection",
        "calls",
        "callers",
        "ended",
        "is_scheduled",
        "limit",
        "left_alone",
    )

    def __init__(
        self,
        request: web.BaseRequest,
        connection: Connection,
        task: "asyncio.Future[Any]",
    ) -> None:
        super().__init__(task)
        self.request = request
        self.connection = connection  # aiohttp lets go of request.task before the end
        self.options: List[Options] = []
        self.are_default = True  # all of those
        self.releases_body = False  # one of those
        self.calls: List[Serving] = []
        # Who has raised those; and of these who is done, with an outcome that only the
        # task has then.
        self.callers: Dict[int, ref[asyncio.Task[Any]]] = {}
        self.ended: List[ref[asyncio.Task[Any]]] = []
        self.is_scheduled = False
        self.limit = MOST_NOTED
        self.left_alone = False

    def add_options(self, options: Options) -> None:
        for each in self.options:
            if each is options:
                return
        self.options.append(options)
        self.are_default = self.are_default and options.are_default
        self.releases_body = self.releases_body or options.release_body

    def add_calls(self, serving: Serving) -> None:
        if serving not in self.calls:
            self.calls.append(serving)
        for options in serving.options:
            self.add_options(options)

    def note_here(self, exc: BaseException) -> None:
        """Note what has gone by in the current task: one request may try for ever."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # the coroutine is thrown away
            task = None
        if task is None:
            self.note(exc)
        else:
            self.note_by(exc, task)

    def note_by(self, exc: BaseException, task: "asyncio.Task[Any]") -> None:
        self.note(exc)
        self.callers[id(task)] = ref(task)
        if self.are_default:
            self.look_soon()
        # Of thousands of tasks each may have swallowed its own: then few are noted.
        number = max(len(self.exceptions), len(self.callers))
        if number >= self.limit and not self.is_scheduled:
            self.is_scheduled = True
            task.get_loop().call_soon(self.sever_older_ones)

    def _can_forget(self) -> bool:
        # The frames of a websocket's handler are to be looked at.
        return self.are_default and hdrs.UPGRADE not in self.request.headers

    def _tell_of_dropped(self, roots: List[BaseException]) -> None:
        if not any(options.listener for options in self.options):
            return
        for root in roots:
            if somebody_has(root):  # who has swallowed it, too
                continue
            exceptions = graph(root)
            frames = sum(1 for exc in exceptions for _ in frames_of(exc))
            self._tell(root, Cut(len(exceptions), frames, frames))

    def sever_older_ones(self) -> None:
        try:
            self.is_scheduled = False
            if self.reference is None:
                return  # it has ended meanwhile
            own = internals.request_task(self.request)
            if own is None:
                return  # it is about to
            self.callers[id(own)] = ref(own)
            tasks = _alive(self.callers.values())
            going_on = [task for task in tasks if not task.done()]
            self.callers = {id(task): ref(task) for task in going_on}
            ended = _alive(self.ended)
            looked_at_before = len(ended)
            ended += [task for task in tasks if task.done()]
            self.ended = list(map(ref, ended))
            in_use = look_into(going_on, lists=True)
            out = [
                exc
                for exc in self.exceptions[: -MOST_NOTED // 2]
                if id(exc) not in in_use.exceptions
            ]
            self._take_out(out)
            # Where very much is left, or very many tasks, the next look is not so soon.
            left = 2 * max(len(self.exceptions), len(self.callers))
            self.limit = max(MOST_NOTED, left, looked_at_before // 8)
            # An outcome may still be asked for, and who has failed with it may have the
            # task: a cycle.  So it is neither severed nor held; the task has it.
            in_use.exceptions.update(look_into(ended, lists=True).exceptions)
            older = [exc for exc in out if id(exc) not in in_use.exceptions]
            if not self.left_alone:
                self._sever(older, Emptied(), in_use)
        except Exception:
            complain("severing a request that goes on")

    def _note_outcomes(self) -> None:
        for exc in look_into(_alive(self.ended), lists=True).exceptions.values():
            self.note(exc)

    def _note_error_of_websocket(self, response: Any) -> None:
        """Note why a websocket that its handler has returned open was not closed well.

        aiohttp closes it after all middlewares, and its client may have hung up.
        """
        if internals.is_websocket_of(self.request, response):
            error = internals.error_of_websocket(response)
            if error is not None:
                self.note(error)

    def done(self, task: "asyncio.Future[Any]") -> None:
        _end_once_told(self, task)

    def end(self, task: "asyncio.Future[Any]") -> None:
        looks_again = False
        try:
            self.request.__dict__.pop(FOLLOWED, None)
            for kept in internals.kept_exceptions(self.request):
                self.note(kept)
            if hdrs.UPGRADE in self.request.headers:
                self._note_error_of_websocket(internals.response_of(task))
            if self.ended:
                self._note_outcomes()
            asks_nobody = self.are_default and not self.left_alone
            for serving in self.calls:
                if asks_nobody and serving.unread():
                    _look_later(serving)
                serving.over = True
                for error in serving.errors():
                    self.note(error)
            self._let_go()
            connection = self.connection
            connection.following -= 1
            if connection.later:
                connection.sever_later_ones()
            if not self.left_alone:
                dropped = self._drop(task)
                if dropped and self.exceptions[0] is not internals.response_of(task):
                    # In the context of the request: finalizers find its variables.
                    self.exceptions = []
                if self.exceptions and not dropped:
                    self._sever(self.exceptions, _emptied_by(connection), task=task)
                elif self.calls:
                    self._keep_error_of(task, ())
                self._release(task)
                if dropped or internals.has_read_body(self.request):
                    looks_again = _look_again_soon(
                        self, connection, self.exceptions, dropped, task
                    )
        except Exception:
            complain("severing a request")
        finally:
            self._let_go()
            # A finalizer of what was let go may keep its frame, which leads here.
            if not looks_again:
                del self.request
            # The traceback of an exception that is left alone may lead here.
            self.exceptions = []
            self._stop_timer()
            if not self.connection.following:
                self.connection.emptied = None
            del self.connection

    def _drop(self, task: "asyncio.Future[Any]") -> bool:
        """Cut only what aiohttp holds, if nobody else holds anything.

        Then the rest goes by itself, in a fraction of the time that severing takes.
        """
        connection = self.connection
        if len(self.exceptions) != 1 or not COUNTS_ARE_EXACT or not self._can_forget():
            return False
        exc = self.exceptions[0]
        response = internals.response_of(task)
        # References: the list, the variable, the argument; for the response also its
        # variable, the task's result and frame, and perhaps the connection's frame.
        known = 3
        if exc is response:
            known = 6 + connection.holds(exc)
        if getrefcount(exc) != known or not goes_by_itself(exc):
            return False
        if exc is response:
            first = next(frames_of(exc), None)
            # One that was not raised up to aiohttp's frame was returned.
            if first is None or first.f_code is not HANDLE_REQUEST:
                return False
            # The traceback stays: somebody else may have it after all.
            empty_with_callers(first)
        self._tell_of_dropped([exc])
        return True

    def _sever(
        self,
        roots: List[BaseException],
        emptied: Emptied,
        in_use: "Optional[InUse]" = None,
        task: "Optional[asyncio.Future[Any]]" = None,
    ) -> None:
        """Sever what nobody needs any more; leave the rest to who has it in hand.

        Args:
            roots: what this request has noted.
            emptied: as for :func:`sever`.
            in_use: what its own tasks need; None: they are done.
            task: that of the request, which is done then.
        """
        sorted_out = sort_out(roots, in_use, self._is_kept)
        # Who has those in flight has passed no middleware: a background task.
        if in_use is not None:
            leave(sorted_out.in_flight, self._clears_frames, sorted_out.kept)
        else:
            self.connection.keep_for_later(
                sorted_out.in_flight, self._clears_frames, sorted_out.kept
            )
        if task is not None:
            self._keep_error_of(task, sorted_out.kept)
        for root, own in sorted_out.ready:
            if in_use is None:  # or its websocket goes on
                own += _release_websocket(self.request, own)
            cut = sever(
                own,
                clear_frames=self._clears_frames,
                spared=sorted_out.spared,
                emptied=emptied,
                references=None
                if task is None
                else partial(self._references, sorted_out, root, task),
            )
            self._tell(root, cut)
        if len(sorted_out.ready) > 1:
            # The frames of one have the function that is called in those of another.
            empty_functions(list(emptied.frames.values()))

    def _keep_error_of(self, task: "asyncio.Future[Any]", kept: Container[int]) -> None:
        """Have what aiohttp has raised out of the request's task severed later.

        It does after all middlewares, of a handler that has failed when its response
        was begun.  The connection's task is told of it next, may log it, and ends.  It
        would go by itself; but where a task factory wraps all tasks, the wrapper's
        frame may have the task, which has the exception.  So may the frames of a call
        that takes too long, whose body is read to be the answer's.
        """
        error = internals.error_of(task)
        if error is None or any(error is each for each in self.exceptions):
            return
        if not self._is_kept(error):
            self.connection.keep_for_later([error], self._clears_frames, kept)

    def _references(
        self,
        sorted_out: SortedOut,
        root: BaseException,
        task: "asyncio.Future[Any]",
    ) -> "Counter[int]":
        """How many references to exceptions are of the library's and of aiohttp's."""
        known = Counter(map(id, self.exceptions))
        known.update(map(id, sorted_out.in_flight))
        known.update(id(each) for each, _ in sorted_out.ready)
        known[id(root)] += 2  # the variable, and the argument of this
        response = internals.response_of(task)
        known[id(response)] += 1 + self.connection.holds(response)
        return known

    @property
    def _clears_frames(self) -> bool:
        return all(options.clear_frames for options in self.options)

    def _is_kept(self, exc: BaseException) -> bool:
        for options in self.options:
            if options.keep is None:
                continue
            try:
                if options.keep(cast(web.Request, self.request), exc):
                    return True
            except ENDS:
                raise
            except BaseException:
                complain(f"keep={_name(options.keep)}")
                return True  # a leak is better than a traceback lost
        return False

    def _tell(self, root: BaseException, cut: Cut) -> None:
        listeners = [each.on_break for each in self.options if each.on_break]
        listeners += [each.listener for each in self.options if each.listener]
        if not listeners:
            return
        event = BreakEvent(
            method=self.request.method,
            route=canonical_path(self.request),
            exception=type(root),
            exceptions=cut.exceptions,
            tracebacks=cut.tracebacks,
            frames=cut.frames,
        )
        for on_break in listeners:
            try:
                on_break(event)
            except ENDS:
                raise
            except BaseException:
                complain(f"on_break={_name(on_break)}")

    def _release(self, task: "asyncio.Future[Any]") -> None:
        request = self.request
        if hdrs.UPGRADE in request.headers:
            internals.release_websocket(request, internals.response_of(task))
        if internals.missing_route(request) is not None:
            internals.forget_missing_route(request)
        if not request.body_exists:
            return
        internals.resume_reading(request)
        if self.releases_body and request.content.is_eof():
            internals.release_body(request, BodyReleasedError)
        else:
            late = BodyReleasedError if self.releases_body else web.PayloadAccessError
            _release_payload(request, self.connection, late)


def _look_later(serving: Serving, pause: float = FIRST_PAUSE) -> None:
    """Look at responses that tasks read on when their request has ended.

    Nobody is told which of them breaks off, nor which task has it: of several calls
    that are gathered the first failure may end the request.
    """
    loop = asyncio.get_running_loop()
    loop.call_later(pause, _look_at_unread, serving, pause, context=Context())


def _look_at_unread(serving: Serving, pause: float) -> None:
    try:
        leave(serving.errors())
        if serving.unread():
            _look_later(serving, 2 * pause)
    except Exception:
        complain("looking at calls that go on")


def _emptied_by(connection: Connection) -> Emptied:
    """What was emptied for requests that end with this one, such as its clones."""
    if connection.emptied is None:
        connection.emptied = Emptied()
    return connection.emptied


class Asked:
    """A request with so little to follow that its task is only asked once it is done.

    That is what became of an exception that was put off, and a body to let go.  The
    connection's next request is not waited for: a middleware outside of ours may answer
    it.  Where an option would have a say in that, the request is followed instead.
    """

    __slots__ = ("request", "connection")

    def __init__(self, request: web.BaseRequest, connection: Connection) -> None:
        self.request = request
        self.connection = connection

    def done(self, task: "asyncio.Future[Any]") -> None:
        _end_once_told(self, task)

    def end(self, task: "asyncio.Future[Any]") -> None:
        try:
            connection = self.connection
            if connection.asked is self.request:
                connection.asked = None
            if connection.following and FOLLOWED in self.request.__dict__:
                return  # another layer does all that, and has options of its own
            if connection.later:
                connection.sever_later_ones()
            dropped = None
            if not internals.kept_exceptions(self.request):
                dropped = self._drop()
            if dropped is None:
                self._follow(task).end(task)
                return
            if self.request.body_exists:
                internals.resume_reading(self.request)
                _release_payload(self.request, connection)
            if dropped or internals.has_read_body(self.request):
                _look_again_soon(self, connection, dropped, True, task)
        except Exception:
            complain("letting go of a request")

    def _drop(self) -> Optional[List[BaseException]]:
        """As :meth:`FollowedRequest._drop`, of what was put off.

        Returns:
            The exception that goes by itself now, if there is one; None: there is
            something to sever.
        """
        connection = self.connection
        exc = connection.put_off
        if exc is None or connection.raised_by is not self.request:
            return []
        # References: the variable, the argument, the attribute, the task's result and
        # frame; perhaps the connection's frame, if it has no later response yet.
        known = 5 + connection.holds(exc)
        if (
            getrefcount(exc) != known
            or not goes_by_itself(exc)
            or not clear_request_frame(exc)  # or it was returned
            or getrefcount(exc) != known - 1
        ):
            return None
        connection.take_back()
        return [exc]

    def _follow(self, task: "asyncio.Future[Any]") -> FollowedRequest:
        """Follow the request to its end, as others that keep something are."""
        followed = FollowedRequest(self.request, self.connection, task)
        del self.request  # what is followed counts the references to it
        self.connection.following += 1
        exc = self.connection.take_back_of(followed.request)
        if exc is not None:
            followed.note(exc)
        return followed


def _release_payload(
    request: web.BaseRequest,
    connection: Connection,
    late: Type[web.PayloadAccessError] = web.PayloadAccessError,
) -> None:
    content = request.content
    if not internals.release_payload(content, late):
        # The client still sends the body; aiohttp reads on for a while.
        connection.unread = partial(internals.release_payload, content, late)
        content.on_eof(partial(unread_has_come, connection.reference))


def _look_again_soon(
    owner: "Union[FollowedRequest, Asked]",
    connection: Connection,
    exceptions: List[BaseException],
    are_dropped: bool,
    task: "asyncio.Future[Any]",
) -> bool:
    """Look once more when the task is gone, with its context and other callbacks.

    Until then these may have the request, its body and a response that was raised.

    Args:
        owner: who has the request.
        connection: the connection of the request.
        exceptions: what the request has raised.
        are_dropped: whether these were to go by themselves.
        task: the task of the request, which is done.

    Returns:
        Whether that is to come: *owner* has the request until then.
    """
    # No variable may hold the request here: its references are counted further down.
    if not exceptions and _release_read_body(owner, connection, exceptions):
        return False
    look_again = partial(
        _look_again, owner, connection, exceptions, are_dropped, ref(task)
    )
    task.get_loop().call_soon(look_again, context=Context())
    return True


def _look_again(
    owner: "Union[FollowedRequest, Asked]",
    connection: Connection,
    exceptions: List[BaseException],
    are_dropped: bool,
    task: "ref[asyncio.Future[Any]]",
) -> None:
    try:
        if are_dropped:
            _sever_from_task(connection, exceptions, task())
        if internals.has_read_body(owner.request):
            _release_read_body(owner, connection, exceptions)
    except Exception:
        complain("looking at a request again")
    finally:
        del owner.request


def _sever_from_task(
    connection: Connection,
    exceptions: List[BaseException],
    task: "Optional[asyncio.Future[Any]]",
) -> None:
    """Sever a response whose own frames have the task that it is the result of.

    A :class:`asyncio.TaskGroup` has it, for one.
    """
    if task is None:
        return
    for exc in exceptions:
        if leads_to(exc, task):
            connection.sever_shared([exc])


def _release_read_body(
    owner: "Union[FollowedRequest, Asked]",
    connection: Connection,
    exceptions: List[BaseException],
) -> bool:
    """Let go of the body, if nobody but the connection's task has the request.

    Nobody can read it any more then, and an idle connection would keep it until
    its next request.

    Returns:
        Whether it has been let go.
    """
    try:
        request = owner.request
        if not COUNTS_ARE_EXACT:
            return False
        for reference in getweakrefs(request):
            if type(reference) is not Watching:
                return False
        for exc in exceptions:
            # What is left of a response's traceback goes only when the response does.
            # References: the list, the variable, the argument; the connection's frame.
            known = 3 + connection.holds(exc)
            if getrefcount(exc) == known and goes_by_itself(exc):
                # A finalizer may report it, as who has a weak reference may.
                if getweakrefs(exc) or hasattr(type(exc), "__del__"):
                    for frame in frames_of(exc):
                        empty(frame)
                else:
                    detach(exc)  # nobody comes to it any more
        # References: the attribute, the variable, the argument; the connection's frame.
        known = 3 + connection.holds(request)
        if (
            getrefcount(request) == known
            and getrefcount(request.__dict__) == _UNSHARED_DICT
        ):
            internals.release_read_body(request)
            return True
    except Exception:
        complain("releasing a body")
    finally:
        request = None  # type: ignore[assignment]  # as in FollowedRequest.end()
    return False


def _release_websocket(
    request: web.BaseRequest, exceptions: List[BaseException]
) -> List[BaseException]:
    """Release the websocket of a handler that raised, and so did not return it.

    Returns:
        The exceptions that it kept, but for those by which it was found.
    """
    if hdrs.UPGRADE not in request.headers:
        return []
    values = [
        value
        for exc in exceptions
        for frame in frames_of(exc)
        for value in local_values(frame)
    ]
    websocket = _websocket_among(request, values)
    if websocket is None:  # an object of the application's may have it
        objects = {id(value): value for value in values}.values()
        attributes = [each for value in objects for each in attributes_of(value)]
        websocket = _websocket_among(request, attributes)
    if websocket is None:
        return []
    internals.release_websocket(request, websocket)
    error = internals.error_of_websocket(websocket)
    below = [] if error is None else graph(error)
    own = set(map(id, exceptions))
    return [exc for exc in below if id(exc) not in own]


def _websocket_among(
    request: web.BaseRequest, values: List[Any]
) -> Optional[web.WebSocketResponse]:
    for value in values:
        if internals.is_websocket_of(request, value):
            return value  # type: ignore[no-any-return]
    return None
