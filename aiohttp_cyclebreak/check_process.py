"""What happens in the application's own process? Serves it on loopback, and counts.

:mod:`aiohttp_cyclebreak.check` starts it and talks to it through its standard input
and output, in lines of JSON: each command has one answer, and a line that says what is
tried may come before the first.
"""

import ast
import asyncio
import contextlib
import faulthandler
import gc
import importlib
import inspect
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from asyncio.trsock import TransportSocket
from collections import Counter, deque
from dataclasses import dataclass, field
from io import TextIOWrapper
from types import CodeType, MethodType
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Set,
    TextIO,
    Tuple,
)
from weakref import WeakSet

from aiohttp import web

from .chains import shortest_chain
from .counts import type_name
from .middleware import setup
from .probe import collect_garbage, requests_alive, spin
from .server import guard_server

__all__ = ("NotThere", "Target", "find", "parse_target")

# Seconds that tasks may outlive the connections: aiohttp itself waits 10 for what is
# missing of a body.
_SETTLES = 15.0
_CHAIN_BUDGET = 10.0  # seconds to look for chains
_LOOKED_AT = 5  # of the requests that are left, how many chains are looked for


class NotThere(Exception):
    """What was named is not there, or is no application: wrong usage."""


@dataclass(frozen=True)
class Target:
    """Where an application is: ``module:attribute`` or ``module:attribute(literals)``.

    Attributes:
        text: as it was written.
        module: the module to import.
        attribute: the name in it, with dots where it is below another one.
        arguments: what to call it with, if it was written as a call.
    """

    text: str = field(repr=False)
    module: str
    attribute: str
    arguments: Optional[Tuple[Tuple[Any, ...], Dict[str, Any]]] = field(
        default=None, repr=False
    )

    @property
    def name(self) -> str:
        """Where it is, without the arguments: these may be secret."""
        return f"{self.module}:{self.attribute}"


def parse_target(text: str) -> Target:
    """Take ``module:attribute``, which may be a call with literals, to pieces.

    Raises:
        ValueError: it is not of that form; the message says what is.
    """
    module, colon, expression = text.partition(":")
    if not colon or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            f"{text.partition('(')[0]!r} is not MODULE:ATTRIBUTE, such as "
            "myapp:create_app, myapp:app or "
            "\"myapp:create_app('test', debug=True)\""
        )
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        arguments = None
        if isinstance(tree, ast.Call):
            positional = tuple(ast.literal_eval(each) for each in tree.args)
            named = {}
            for keyword in tree.keywords:
                if keyword.arg is None:
                    raise ValueError("**")
                named[keyword.arg] = ast.literal_eval(keyword.value)
            arguments = positional, named
            tree = tree.func
        names: List[str] = []
        while isinstance(tree, ast.Attribute):
            names.insert(0, tree.attr)
            tree = tree.value
        if not isinstance(tree, ast.Name):
            raise ValueError(type(tree).__name__)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"after {module}: comes neither a name nor a call of one with literals: "
            "strings, numbers, True, False, None, and lists or dicts of them"
        ) from None
    return Target(text, module, ".".join([tree.id, *names]), arguments)


def find(target: Target, words: List[str], tell: Callable[[str], None]) -> Any:
    """Import an application, or import a factory and call it.

    Args:
        target: where it is.
        words: what else stands on the command line, for a factory that takes the
            list of them as those of ``python -m aiohttp.web`` do.
        tell: told what is tried, before it is.

    Returns:
        An application or a runner; or something that is to be awaited to get it.

    Raises:
        NotThere: there is no such module or name, or it cannot be called.
    """
    tell(f"import {target.module}")
    try:
        with _nobody_serves():
            found = importlib.import_module(target.module)
    except ModuleNotFoundError as exc:
        if not f"{target.module}.".startswith(f"{exc.name}."):
            raise  # one that the application needs
        raise NotThere(
            f"there is no module {exc.name!r} in {os.getcwd()} or among what is "
            "installed: say --chdir, or install it"
        ) from None
    for name in target.attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise NotThere(f"{target.module} has no {target.attribute!r}") from None
    if target.arguments is None and isinstance(found, (web.Application, web.AppRunner)):
        if words:
            raise NotThere(f"{target.name} is no factory, and takes no --arg")
        return found
    if not callable(found):
        raise NotThere(
            f"{target.name} is neither an aiohttp.web.Application nor a function "
            f"that makes one, but {type_name(type(found))}"
        )
    positional, named = target.arguments or ((), {})
    if words or (target.arguments is None and _takes_one(found)):
        positional = (*positional, words)
    tell(f"call {target.name}()")
    return found(*positional, **named)


@contextlib.contextmanager
def _nobody_serves() -> Iterator[None]:
    """Let a script that ends in ``web.run_app()`` be imported all the same."""
    run_app = web.run_app

    def run_nothing(app: Any, **options: Any) -> None:
        if inspect.iscoroutine(app):
            app.close()  # nobody awaits it, which Python would complain about

    web.run_app = run_nothing
    try:
        yield
    finally:
        web.run_app = run_app


def _takes_one(factory: Callable[..., Any]) -> bool:
    """Whether a factory insists on one argument, as ``def main(argv)`` does."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return False
    insists = [
        each
        for each in signature.parameters.values()
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    return len(insists) == 1 and insists[0].kind is not insists[0].KEYWORD_ONLY


def memory() -> Tuple[Optional[int], str]:
    """The memory that this process has, in bytes, and what that number is."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), "resident set size"
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None, "not known on this platform"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Nothing in the standard library tells the present size elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit, "peak of the resident set size"


# What a transport of asyncio is made of, beside its methods.
_PARTS = (dict, tuple, list, deque, bytearray, socket.socket, TransportSocket)


def _of_asyncio(garbage: List[Any]) -> Set[int]:
    """The ids of closed transports, and of what only they are made of.

    A transport of asyncio is a reference cycle of its own, with a method that is
    bound to it: before CPython 3.13 always, then if it ended by an error.
    """
    inside = {id(each): each for each in garbage}
    own = set()
    for transport in garbage:
        if not issubclass(type(transport), asyncio.Transport):
            continue
        todo: List[Any] = [transport]
        while todo:
            each = todo.pop()
            if id(each) in own:
                continue
            own.add(id(each))
            for part in gc.get_referents(each):
                if id(part) not in inside:
                    continue
                if type(part) is MethodType:
                    if part.__self__ is transport:
                        todo.append(part)
                elif any(type(part) is kind for kind in _PARTS):
                    todo.append(part)
    return own


def _collect() -> List[Any]:
    """As :func:`collect_garbage`, without asyncio's own."""
    garbage = collect_garbage()
    asyncios = _of_asyncio(garbage)
    return [each for each in garbage if id(each) not in asyncios]


def _chains(objects: List[Any]) -> List[Dict[str, Any]]:
    """The chains that hold some of these objects, each that differs once."""
    few = objects[:: max(1, len(objects) // _LOOKED_AT)][:_LOOKED_AT]
    found: Dict[str, Dict[str, Any]] = {}
    while few:
        chain = shortest_chain(
            few.pop(), ignore=(objects, few), budget=_CHAIN_BUDGET / _LOOKED_AT
        )
        if chain is not None:
            text = str(chain).strip()
            # That one is in another place of a list makes no difference.
            found.setdefault(
                re.sub(r"index \d+", "index", text),
                {
                    "text": text,
                    "kind": chain.kind,
                    "leak": chain.leak,
                    "advice": chain.advice,
                },
            )
    return list(found.values())


class _Collections:
    """Counts what the collector does, but for what is called here."""

    def __init__(self) -> None:
        self.by_generation = [0, 0, 0]
        self.seconds = 0.0
        self._started = 0.0

    def __call__(self, phase: str, info: Dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._started
            self.by_generation[info["generation"]] += 1


class _Server:
    """The served application, and what is asked about it."""

    def __init__(self, runner: web.AppRunner) -> None:
        assert runner.server is not None
        self._server = runner.server
        self._tasks = asyncio.all_tasks()
        self._lasting: WeakSet[asyncio.Task[Any]] = WeakSet()  # waited for in vain
        self._collector = gc.isenabled()  # as the application leaves it
        self._collections = _Collections()
        self._before: Set[int] = set()  # the ids of those that there were before
        self._served = 0
        self._cpu = 0.0
        self._begun = 0.0

    async def begin(self, collector: bool) -> Dict[str, Any]:
        """Begin to count, with the collector off or as the application has it."""
        await self._settle()
        gc.collect()
        gc.disable()
        await spin()  # finalizers may have put something into the loop
        gc.collect()
        self._before = set(map(id, requests_alive()))
        self._served = self._server.requests_count
        self._collections = _Collections()
        gc.callbacks.append(self._collections)
        if collector and self._collector:
            gc.enable()
        self._cpu = time.process_time()
        self._begun = time.perf_counter()
        return await self.sample()

    async def sample(self) -> Dict[str, Any]:
        """The memory now."""
        size, _ = memory()
        return {"seconds": time.perf_counter() - self._begun, "bytes": size}

    async def spin(self) -> Dict[str, Any]:
        """Let the application begin with what has arrived."""
        await spin()
        return {}

    async def end(self, collector: bool) -> Dict[str, Any]:
        """Count what there is, once all clients have gone."""
        await spin()
        cpu = time.process_time() - self._cpu
        served = self._server.requests_count - self._served
        answer: Dict[str, Any] = {"cpu": cpu, "served": served}
        answer["busy"] = await self._settle()
        gc.disable()
        gc.callbacks.remove(self._collections)
        answer["collections"] = self._collections.by_generation
        answer["collector_seconds"] = self._collections.seconds
        if collector:
            return answer
        answer["left"] = max(0, len(requests_alive()) - len(self._before))
        garbage = _collect()
        types = Counter(type_name(type(each)) for each in garbage)
        answer["garbage"] = dict(types.most_common())
        garbage.clear()
        gc.collect()
        await spin()
        gc.collect()
        answer["held"] = max(0, len(requests_alive()) - len(self._before))
        return answer

    async def explain(self, garbage: bool) -> Dict[str, Any]:
        """Look for what holds what is left, which makes garbage of its own.

        Args:
            garbage: look at other cyclic garbage where no request is left.
        """
        await self._settle()
        gc.disable()
        gc.callbacks.remove(self._collections)
        found = _chains(self._new_requests())
        if garbage and not found:
            found = _chains(_collect())
        gc.collect()
        # Those that are held for good may have been too few to be looked at.
        texts = {each["text"] for each in found}
        found += [
            each for each in _chains(self._new_requests()) if each["text"] not in texts
        ]
        return {"chains": found}

    def _new_requests(self) -> List[Any]:
        return [each for each in requests_alive() if id(each) not in self._before]

    async def _settle(self) -> int:
        """Wait for the end of all connections, and for what they have started.

        What does not end is waited for once: a task that the first request has started
        for good.

        Returns:
            How many tasks go on all the same.
        """
        deadline = time.monotonic() + _SETTLES
        while self._server.connections or self._started() - set(self._lasting):
            if time.monotonic() > deadline:
                self._lasting.update(self._started())
                break
            await asyncio.sleep(0.001)
        await spin()
        return len(self._started())

    def _started(self) -> "Set[asyncio.Task[Any]]":
        return asyncio.all_tasks() - self._tasks


def _read(
    commands: TextIO,
    loop: asyncio.AbstractEventLoop,
    queue: "asyncio.Queue[Optional[Dict[str, Any]]]",
) -> None:
    """Hand over what is asked, up to the end; then nobody waits for us any more."""
    for line in commands:
        command = json.loads(line)
        is_last = command["do"] == "stop"
        loop.call_soon_threadsafe(queue.put_nowait, command)
        if is_last:
            return
    loop.call_soon_threadsafe(queue.put_nowait, None)


async def _serve(
    made: Any,
    guarded: bool,
    target: Target,
    commands: TextIO,
    answer: Callable[..., None],
) -> None:
    def tell(trying: str) -> None:
        answer(trying=trying)

    if inspect.isawaitable(made):
        tell(f"await {target.name}()")
        made = await made
    if isinstance(made, web.Application):
        app = made
        runner = web.AppRunner(app)
    elif isinstance(made, web.AppRunner):
        app, runner = made.app, made
    else:
        raise NotThere(
            f"{target.name} makes no aiohttp.web.Application, but "
            f"{type_name(type(made))}"
        )
    if guarded:
        tell("setup(app), the guard")
        setup(app)
    tell("start the application: on_startup and cleanup_ctx")
    await runner.setup()
    try:
        if guarded:
            tell("guard_server(runner), the guard")
            guard_server(runner)
        tell("listen on 127.0.0.1")
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        await web.SockSite(runner, sock).start()
        faulthandler.cancel_dump_traceback_later()
        queue: asyncio.Queue[Optional[Dict[str, Any]]] = asyncio.Queue()
        arguments = (commands, asyncio.get_running_loop(), queue)
        threading.Thread(target=_read, args=arguments, daemon=True).start()
        server = _Server(runner)
        loop = type(asyncio.get_running_loop())
        answer(
            port=sock.getsockname()[1],
            memory=memory()[1],
            event_loop=f"{loop.__module__}.{loop.__qualname__}",
        )
        while True:
            command = await queue.get()
            if command is None or command["do"] == "stop":
                return
            do = command.pop("do")
            answer(**await getattr(server, do)(**command))
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def _pipes() -> Iterator[Tuple[TextIO, TextIO]]:
    """Keep the standard input and output to ourselves.

    What the application prints goes to its standard error, line by line, since this
    process may be ended by force; and it has nothing to read.
    """
    with contextlib.ExitStack() as stack:
        commands = stack.enter_context(os.fdopen(os.dup(0), "r", encoding="utf-8"))
        answers = stack.enter_context(os.fdopen(os.dup(1), "w", encoding="utf-8"))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        yield commands, answers


def _without_ours(exc: BaseException) -> str:
    """A traceback, from the application's own first frame on."""
    entry = first = exc.__traceback__
    while entry is not None:
        if _is_ours(entry.tb_frame.f_code):
            first = entry.tb_next
        entry = entry.tb_next
    return "".join(traceback.format_exception(type(exc), exc, first))


def _is_ours(code: CodeType) -> bool:
    return code.co_filename in (__file__, importlib.__file__) or (
        code.co_filename.startswith("<frozen importlib")
    )


def main() -> int:
    """Serve the application that the first line of the standard input names."""
    # Ctrl-C is for who started this, and who ends it then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _pipes() as (commands, answers):

        def answer(**what: Any) -> None:
            answers.write(f"{json.dumps(what)}\n")
            answers.flush()

        config = json.loads(commands.readline())
        target = parse_target(config["target"])
        faulthandler.enable()
        # Shows where it hangs.
        faulthandler.dump_traceback_later(config["timeout"], exit=True)
        os.chdir(config["chdir"])
        sys.path.insert(0, os.getcwd())
        sys.argv = [target.text, *config["words"]]
        # As web.run_app() has it: there is a loop, which does not run yet.
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            made = find(target, config["words"], lambda trying: answer(trying=trying))
            by_policy = asyncio.new_event_loop()
            if type(by_policy) is not type(loop):  # the application has set another
                loop, by_policy = by_policy, loop
            by_policy.close()
            asyncio.set_event_loop(loop)  # the application may have ended another one
            loop.run_until_complete(
                _serve(made, config["guarded"], target, commands, answer)
            )
        except NotThere as exc:
            answer(not_there=str(exc))
            return 2
        except SystemExit as exc:
            answer(failed=f"SystemExit: {exc.code}", traceback="")
            return 1
        except BaseException as exc:
            answer(failed=type(exc).__name__, traceback=_without_ours(exc))
            return 1
        return 0


if __name__ == "__main__":
    sys.exit(main())
