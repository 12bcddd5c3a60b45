"""Who makes outgoing calls? Notes those that fail: a request's, or a task's own."""

import asyncio
import sys
from contextvars import Context
from functools import partial
from typing import Any, Dict, List, Optional
from weakref import ref

from . import calls, internals
from .calls import Calls, Serving
from .complaints import complain
from .guard import follow
from .holders import MOST_NOTED, Holder, InUse, in_hand, leave, look_into, sort_out
from .sever import sever

__all__ = (
    "note_call",
    "note_failed_call",
    "note_last_attempt",
    "note_successful_call",
    "note_upload",
)

# By the id of its task; as followed_connections, it keeps nothing alive.
_callers: "Dict[int, ref[_Caller]]" = {}


class _Caller(Holder):
    """A task that makes outgoing calls outside of any guarded request."""

    __slots__ = ("calls", "due")

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        super().__init__(task)
        self.calls = Calls()
        self.due: List[BaseException] = []

    def call_ended(self) -> None:
        """Sever what earlier calls have left, once the task waits for something.

        Only then does the interpreter tell what the task has in hand.
        """
        current = sys.exc_info()[1]
        is_scheduled = bool(self.due)
        self.due = [exc for exc in self.exceptions if exc is not current]
        task = self.task()
        if self.due and not is_scheduled and task is not None:
            task.get_loop().call_soon(self.sever_due_ones)

    def sever_due_ones(self) -> None:
        try:
            due, self.due = self.due, []
            task = self.task()
            if task is not None and not task.done():
                in_use = look_into([task])
                self._sever(due, in_use)
                self.calls.forget_dead()  # or what this frees puts the next look off
        except Exception:
            complain("severing the calls of a task")

    def done(self, task: "asyncio.Future[Any]") -> None:
        try:
            _callers.pop(id(task), None)
            self.note_errors()
            self._sever(list(self.exceptions))
            leave(self.exceptions)
        except Exception:
            complain("severing the calls of a task")
        finally:
            self._let_go()
            self._stop_timer()
            self.exceptions = []
            self.due = []

    def note_errors(self) -> None:
        for error in self.calls.errors():
            self.note(error)

    def _sever(
        self, roots: List[BaseException], in_use: Optional[InUse] = None
    ) -> None:
        self._take_out(roots)
        sorted_out = sort_out(roots, in_use)
        for _, own in sorted_out.ready:
            sever(own, spared=sorted_out.spared)
        for exc in sorted_out.in_flight[-MOST_NOTED:]:
            self.note(exc)
        if not self.exceptions:
            self._stop_timer()


def _caller_of(task: "Optional[asyncio.Task[Any]]") -> Optional[_Caller]:
    if task is None:
        return None
    key = id(task)
    found = _callers.get(key)
    caller = None if found is None else found()
    if caller is None:
        caller = _Caller(task)
        _callers[key] = ref(caller, partial(_callers.pop, key))
        # Not in the context of the first call: a worker may have another for each job.
        task.add_done_callback(caller.done, context=Context())
    return caller


def note_call(response: Any) -> None:
    """Remember what a call has given, to which an error may come later.

    This runs for every outgoing call, most of which succeed.

    Args:
        response: that of the call, or its websocket.
    """
    try:
        serving = calls.current.get()
        if serving is not None and not serving.over:
            if serving.add(response):
                _look_for_errors(serving)
            return
        caller = _caller_of(asyncio.current_task())
        if caller is None:
            return
        if caller.calls.add(response):
            caller.note_errors()
        if caller.exceptions:
            caller.call_ended()
    except Exception:
        complain("noting a call")


def note_successful_call() -> None:
    """Tell a task whose earlier calls have failed that another one has ended."""
    if not in_hand:
        return  # nobody has noted any exception
    try:
        serving = calls.current.get()
        if serving is not None and not serving.over:
            return
        found = _callers.get(id(asyncio.current_task()))
        caller = None if found is None else found()
        if caller is not None and caller.exceptions:
            caller.call_ended()
    except Exception:
        complain("noting a call")


def _look_for_errors(serving: Serving) -> None:
    request = serving.request()
    if request is None:  # gone without an end: a clone of another one
        serving.over = True
        return
    errors = serving.errors()
    task = asyncio.current_task()
    if not errors or task is None:
        return
    followed = follow(request, None)
    if followed is not None:
        for error in errors:
            followed.note_by(error, task)


def note_failed_call(
    exc: BaseException, task: "Optional[asyncio.Task[Any]]" = None
) -> None:
    """Remember the exception of an outgoing call; nothing about it changes yet.

    Args:
        exc: that.
        task: the one that called; None: the current one.
    """
    if type(exc) is GeneratorExit:
        return
    try:
        beside = internals.error_beside(exc)
        if beside is not None and beside is not exc:
            note_failed_call(beside, task)
        if task is None:
            try:
                task = asyncio.current_task()
            except RuntimeError:  # it is thrown away, and its loop was closed
                return
        serving = calls.current.get()
        request = None if serving is None or serving.over else serving.request()
        followed = None if request is None else follow(request, None)
        if followed is not None and task is not None:
            followed.note_by(exc, task)
            return
        # Outside of any request, or it is not known any more which task handles it.
        caller = _caller_of(task)
        if caller is not None:
            caller.note_errors()
            caller.note(exc)
            caller.call_ended()
            caller.look_soon()
    except Exception:
        complain("noting a failed call")


def note_upload(sends: "asyncio.Task[None]", protocol: Any) -> None:
    """Have it noted if a call that is answered already fails to send its body.

    Args:
        sends: the task that does.
        protocol: that of the call's connection, which no other call has meanwhile.
    """
    try:
        task = asyncio.current_task()
        if task is not None:
            sends.add_done_callback(partial(_upload_ended, ref(protocol), ref(task)))
    except Exception:
        complain("noting an upload")


def _upload_ended(
    protocol: "ref[Any]",
    caller: "ref[asyncio.Task[Any]]",
    sends: "asyncio.Future[None]",
) -> None:
    try:
        task = caller()
        error = internals.error_of_call(protocol())
        if error is not None and task is not None:
            note_failed_call(error, task)
    except Exception:
        complain("noting an upload")


def note_last_attempt() -> None:
    """Remember why the call that is on its way is tried again, if it is."""
    try:
        error = internals.error_of_last_attempt()
        if error is not None:
            note_failed_call(error)
    except Exception:
        complain("noting an attempt to call")
