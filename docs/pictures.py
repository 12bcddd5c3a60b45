"""Draws docs/pictures/: the reference cycle of each leak, from the objects of a run.

``nox -s pictures`` runs this.  Each leak is run against a real server, the garbage
collector being off: bare, where :mod:`aiohttp_cyclebreak.chains` finds what holds a
request, and guarded, where the same objects are looked for again.  There they are held
on purpose, as an error reporter holds an exception, or there would be nothing to draw.

Graphviz's ``dot`` draws it.  Names of types, attributes, functions and variables are in
the pictures, and no value.
"""

import asyncio
import gc
import html
import json
import pathlib
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence, Tuple

import aiohttp
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from aiohttp_cyclebreak import probe
from aiohttp_cyclebreak.chains import _Search
from aiohttp_cyclebreak.leaks import CATALOGUE, Kind, Leak
from aiohttp_cyclebreak.naming import described, global_name, how_held, is_dict_of

AIOHTTP = tuple(int(part) for part in re.findall(r"\d+", aiohttp.__version__)[:3])
FOLDER = pathlib.Path(__file__).with_name("pictures")

# One for each cycle that is different.
LEAKS = (
    "close-cancel",
    "none-response",
    "http-exception",
    "no-route",
    "payload",
    "started",
    "websocket",
    "stash",
    "kept-local",
    "kept-local/traceback",
    "singleton",
    "late-read",
    "gather",
    "gateway/refused/swallow",
    "gateway/cut/swallow",
    "gateway/half/swallow",
    "gateway/released",
    "unseen/malformed",
    "client-gone/response",
    "idle-body",
)
OF_3_10_10 = ("cve-2024-52303",)  # what a later release is free of
# What close-cancel would hide: these are run on connections that are not kept.
KEEPS_CONNECTION = ("close-cancel", "none-response", "websocket", "unseen", "idle-body")

Edge = Tuple[str, str, str]  # from, how, to


@dataclass
class Picture:
    """Objects, by name, and how they hold each other."""

    nodes: List[str] = field(default_factory=list)
    edges: List[Edge] = field(default_factory=list)
    kinds: Dict[str, str] = field(default_factory=dict)  # for the style
    kind: str = ""  # of the chain

    def add(self, each: Any) -> str:
        name = name_of(each)
        if name not in self.nodes:
            self.nodes.append(name)
            self.kinds[name] = kind_of(each)
        return name

    def has(self, kind: str) -> bool:
        return any(self.kinds[name] == kind for name in self.nodes)

    def join(self, holder: Any, how: str, held: Any) -> None:
        edge = (self.add(holder), how, self.add(held))
        if edge not in self.edges:
            self.edges.append(edge)


def name_of(each: Any) -> str:
    """What it is: a type without its package, a function's name, a task's coroutine."""
    if issubclass(type(each), bytes):
        return "the body (bytes)"
    if id(each) in _modules():
        return f"module {_modules()[id(each)]}"
    if issubclass(type(each), asyncio.Task):
        return f"Task of {each.get_coro().__qualname__}"
    what, _, _ = described(each, {})
    if type(each).__name__ == "frame":
        return f"frame of {qualified(each)}"
    return re.sub(r"^(class )?[\w.]*\.(?=\w+$)", r"\1", what).replace("<locals>.", "")


@lru_cache(maxsize=None)
def _modules() -> Dict[int, str]:
    """The names of modules, by the ids of their namespaces."""
    modules = list(sys.modules.items())
    return {id(vars(each)): name for name, each in modules if type(each) is ModuleType}


def qualified(frame: Any) -> str:
    """The name of a frame's function; before CPython 3.11 without its class."""
    code = frame.f_code
    return str(getattr(code, "co_qualname", code.co_name)).replace("<locals>.", "")


def kind_of(each: Any) -> str:
    """How a node is painted."""
    if web.BaseRequest in type(each).__mro__:
        return "request"
    if issubclass(type(each), bytes):
        return "request"
    if issubclass(type(each), BaseException):
        return "exception"
    return {"traceback": "traceback", "frame": "frame"}.get(
        type(each).__name__, "other"
    )


def how_of(holder: Any, held: Any) -> Optional[str]:
    """How one object holds another, itself or by its attributes."""
    attributes = next(
        (each for each in gc.get_referents(holder) if is_dict_of(each, holder)), None
    )
    for name, value in (attributes or {}).items():
        if value is held:
            return f".{name}"
    if not any(each is held for each in gc.get_referents(holder)):
        return None
    found = how_held(holder, held)
    if id(holder) in _modules():
        found = global_name(holder, held).replace("'", "")
    found = found.partition(" of a key")[0]
    found = re.sub(r"^attribute '(.*)'$", r".\1", found)
    found = re.sub(r"^local variable '(.*)'$", r"local \1", found)
    if found == "holds" and issubclass(type(holder), asyncio.Task):
        found = "its exception"  # in C; gc.get_referents() shows it
    return f".{found}" if re.match(r"(__|tb_|f_)", found) else found


class Search(_Search):
    """What finds the shortest chain, and keeps the objects on it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.walks: List[List[Any]] = []

    def _links(self, objects: List[Any]) -> Any:
        self.walks.append(objects)
        return super()._links(objects)


def draw_chain(target: object) -> Picture:
    """Give the shortest chain of references to an object, with the cycle behind it."""
    search = Search([target], [sys._getframe()], None)
    picture = Picture()
    try:
        search.run()
        chain = search.chain_of(target)
        if chain is None:
            raise LookupError("nothing holds it")
        picture.kind = chain.kind
        shown: List[Any] = []
        for walk in reversed(search.walks):  # the cycle first
            kept = []
            for position, each in enumerate(walk):
                before = walk[position - 1] if position else None
                after = walk[position + 1] if position + 1 < len(walk) else None
                if before is not None and is_dict_of(each, before):
                    continue
                if type(each) is type(after) and type(each).__name__ == "traceback":
                    continue
                kept.append(each)
            for holder, held in zip(kept, kept[1:]):
                how = how_of(holder, held)
                if how is None:  # the first of a list of tracebacks
                    how = ".__traceback__"
                picture.join(holder, how, held)
            shown += kept
        if not picture.nodes:
            picture.add(target)
        # How they hold each other beside that.
        for holder in shown:
            for held in shown:
                how = how_of(holder, held)
                if holder is not held and how is not None:
                    picture.join(holder, how, held)
        body = getattr(target, "_read_bytes", None)
        if body:
            picture.join(target, "._read_bytes", body)
        return picture
    finally:
        search.forget()
        search.walks.clear()


async def run(
    leak: Leak, before: Optional[Picture] = None, pin: bool = True
) -> Picture:
    """Set off a leak once, and look at what is left.

    Args:
        leak: the leak.
        before: what was left bare; the run is guarded, and the same is looked for.
        pin: hold the exception on purpose.
    """
    app = web.Application()
    leak.build(app)
    remedy = probe.remedy(leak) if before is not None else {}
    remedy.get("guard", lambda app: None)(app)
    pins: List[Any] = []
    if before is not None and pin:
        app.middlewares.insert(0, pinning(before, pins))
    runner = web.AppRunner(app)
    await runner.setup()
    remedy.get("guard_runner", lambda runner: None)(runner)
    sock = probe._listen()
    await web.SockSite(runner, sock).start()
    server: Any = runner.server
    client = probe._Client(
        sock.getsockname()[1],
        lambda: server.requests_count,
        partial(probe._is_unread, server),
    )
    tasks = set(asyncio.all_tasks())
    busy = partial(getattr, server, "connections")

    async def visit() -> None:
        steps: Any = leak.visits[0]
        if leak.id.partition("/")[0] not in KEEPS_CONNECTION:
            steps = [close(step) for step in steps]
        await client.pay(steps)
        await (probe.spin() if probe.lasts(steps) else probe._settle(busy, tasks))

    try:
        await visit()  # fills the caches
        client.leave()
        await probe._settle(busy, tasks)
        pins.clear()
        gc.collect()
        gc.disable()
        await visit()
        return draw_chain(find(leak)) if before is None else again(before)
    finally:
        gc.enable()
        pins.clear()
        client.leave()
        await runner.cleanup()
        client.close()


def close(step: Any) -> Any:
    """Ask for the end of the connection after the answer."""
    if not isinstance(step, bytes) or b"Connection:" in step:
        return step
    line = b"Host: localhost\r\n"
    return step.replace(line, line + b"Connection: close\r\n", 1)


def find(leak: Leak) -> object:
    """The object to explain: a request, or a connection where there is none."""
    found: List[object] = list(probe.requests_alive())
    if not found:
        found = [each for each in gc.get_objects() if type(each) is RequestHandler]
    return found[-1]


def pinning(before: Picture, pins: List[Any]) -> Any:
    """Make a middleware that holds what the guard is about to cut.

    What is held is the first exception of the picture; or else what is no request.
    """
    exceptions = {name for name, kind in before.kinds.items() if kind == "exception"}
    others = {name for name, kind in before.kinds.items() if kind == "other"}

    def pin(task: "asyncio.Future[Any]") -> None:
        for each in gc.get_objects():  # what is older is frozen
            if kind_of(each) not in ("exception", "other") or not named(each):
                continue
            if name_of(each) in (exceptions or others):
                pins.append(each)

    @web.middleware
    async def middleware(request: web.Request, handler: Any) -> web.StreamResponse:
        # Called before the guard, which adds its own callbacks later.
        for task in (asyncio.current_task(), request.task):
            if task is not None:
                task.add_done_callback(pin)
        return await handler(request)

    return middleware


def named(each: Any) -> bool:
    """Whether it is worth a name: most objects are of other types than those drawn."""
    return not issubclass(type(each), (dict, tuple, list, set, type))


def again(before: Picture) -> Picture:
    """Look for a picture's objects and references among what is alive now."""
    alive: Dict[str, List[Any]] = {name: [] for name in before.nodes}
    # What a module leads to is told by that, and not by its type.
    led_to = "other" if before.kind == "permanent" else ""
    for each in gc.get_objects():
        if named(each) or id(each) in _modules():
            name = name_of(each)
            if name not in alive:
                continue
            if before.kinds[name] != led_to or name.startswith("module "):
                alive[name].append(each)
    picture = Picture(kinds=before.kinds)
    for edge in before.edges:
        holder, how, held = edge
        for one in alive[holder]:
            found = [
                each
                for each in (
                    *gc.get_referents(one),
                    *getattr(one, "__dict__", {}).values(),
                )
                if how_of(one, each) == how and name_of(each) == held
            ]
            if found:
                picture.edges.append(edge)
                alive[held] += found
                break
    held = {held for _, _, held in picture.edges}
    picture.nodes = [
        name
        for name, objects in alive.items()
        # There are always tracebacks: it is one of these if something here holds it.
        if objects and (before.kinds[name] != "traceback" or name in held)
    ]
    return picture


def forget(picture: Picture) -> None:
    """Cut what holds a request for good, so that it is not met again."""
    for each in gc.get_objects():
        if kind_of(each) == "exception" and name_of(each) in picture.nodes:
            each.__traceback__ = None
    gc.collect()


# In Graphviz's language.

_HEAD = """digraph {
graph [rankdir=TB, bgcolor=transparent, nodesep=0.3, ranksep=0.42, pad=0.05]
node [shape=box, style=rounded, color="#808080", fontcolor="#808080", penwidth=1.3,
      fontname="Helvetica,Arial,sans-serif", fontsize=13, height=0.3, margin="0.13,0.06"
     ]
edge [color="#808080", fontcolor="#808080", penwidth=1.3, arrowsize=0.7,
      fontname="Helvetica,Arial,sans-serif", fontsize=11]
"""


def dot(before: Picture, after: Optional[Picture] = None) -> str:
    """What is drawn: all of it, or what of it is left and what is not."""
    now = after or before
    lines = [_HEAD]
    for number, name in enumerate(before.nodes):
        gone = "" if name in now.nodes else " gone"
        style = "" if name in now.nodes else ', style="rounded,dashed"'
        label = json.dumps(wrap(name))
        kind = before.kinds[name]
        lines.append(f'n{number} [label={label}, class="{kind}{gone}"{style}]')
    for holder, how, held in before.edges:
        gone = "" if (holder, how, held) in now.edges else "gone"
        style = ", style=dashed" if gone else ""
        ends = f"n{before.nodes.index(holder)} -> n{before.nodes.index(held)}"
        lines.append(f'{ends} [label={json.dumps(" " + how)}, class="{gone}"{style}]')
    return "\n".join([*lines, "}"])


def wrap(name: str) -> str:
    """Break a long name before a dot or after a word."""
    if len(name) < 26:
        return name
    name = re.sub(r"^(frame|function|method|coroutine|Task)( of)? ", r"\1\2\n", name)
    return name if len(name) < 40 else re.sub(r"(\.)(?=\w+$)", r"\1\n", name)


def svg(source: str, title: str) -> str:
    """Draw it, without what changes from one release of Graphviz to the next."""
    run = subprocess.run(
        ["dot", "-Tsvg"], input=source.encode(), stdout=subprocess.PIPE, check=True
    )
    text = run.stdout.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    text = re.sub(r"<title>.*?</title>\n?", "", text)
    text = re.sub(r' id="\w+"', "", text)
    return text.replace(">", f">\n<title>{html.escape(title)}</title>", 1)


def main(ids: Sequence[str]) -> None:
    """Draw the pictures of these leaks."""
    FOLDER.mkdir(exist_ok=True)
    index_file = FOLDER / "index.json"
    index = json.loads(index_file.read_text("utf-8")) if index_file.exists() else {}
    with probe.quiet():
        for leak in CATALOGUE:
            if leak.id not in ids:
                continue
            print(leak.id)
            before = asyncio.run(run(leak))
            if before.kind != leak.kind.value:
                raise RuntimeError(f"{leak.id} is said to be {leak.kind.value}")
            forget(before)
            after = asyncio.run(run(leak, before))
            if leak.kind is not Kind.LIVE and after.has("request"):
                # No middleware sees it: whoever holds it holds the request.
                after = asyncio.run(run(leak, before, pin=False))
            name = leak.id.replace("/", "-")
            for end, source in (("before", dot(before)), ("after", dot(before, after))):
                file = FOLDER / f"{name}-{end}.svg"
                file.write_text(svg(source, f"{leak.id}, {end}"), "utf-8")
            index[leak.id] = {
                "aiohttp": aiohttp.__version__,
                "python": platform.python_version(),
                "kind": before.kind,
                "exception": after.has("exception"),
                "request": after.has("request"),
            }
    index = {leak.id: index[leak.id] for leak in CATALOGUE if leak.id in index}
    index_file.write_text(json.dumps(index, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    chosen = sys.argv[1:] or [*LEAKS, *OF_3_10_10]
    unknown = set(chosen).difference(leak.id for leak in CATALOGUE)
    if unknown:
        raise SystemExit(f"no leak {', '.join(sorted(unknown))}")
    main([id for id in chosen if (id in OF_3_10_10) is (AIOHTTP == (3, 10, 10))])
