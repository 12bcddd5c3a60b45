"""What is an object called, and how does it hold another? Never told by a value."""

import gc
import inspect
import sys
import threading
from itertools import chain
from types import (
    AsyncGeneratorType,
    CellType,
    CodeType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from .counts import module_of, type_name
from .exceptions import mro_of

__all__ = (
    "attribute_name",
    "described",
    "frame_name",
    "frame_of",
    "global_name",
    "how_held",
    "is_dict_of",
    "is_of",
    "is_resumable",
    "local_name",
    "values_of",
    "variables_of",
)

# Whatever a metaclass says.
_flags_of: Callable[[type], int] = type.__dict__["__flags__"].__get__
_namespace_of: Callable[[type], Mapping[str, Any]] = type.__dict__["__dict__"].__get__

_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_SPECIAL = ("__traceback__", "__cause__", "__context__", "__self__", "__func__")


def is_of(module: object, packages: Sequence[str]) -> bool:
    """Whether the name of a module is that of one of some packages."""
    return isinstance(module, str) and module.partition(".")[0] in packages


def is_resumable(each: Any) -> bool:
    """Whether an object is a coroutine or a generator."""
    # Not by ==: a metaclass may compare its classes as it likes.
    kind = type(each)
    return kind is CoroutineType or kind is GeneratorType or kind is AsyncGeneratorType


def frame_of(resumable: Any) -> Optional[FrameType]:
    """The frame of a coroutine or a generator, if it has not ended."""
    for prefix in ("cr", "gi", "ag"):
        frame = getattr(resumable, prefix + "_frame", None)
        if frame is not None:
            return frame  # type: ignore[no-any-return]
    return None


def _code_of(resumable: Any) -> CodeType:
    for prefix in ("cr", "gi", "ag"):
        code = getattr(resumable, prefix + "_code", None)
        if code is not None:
            break
    return code  # type: ignore[return-value]


# Who may have the dict that is a frame's ``f_locals`` names one of these.
_SHARING = {
    "_getframe",
    "currentframe",
    "dir",
    "eval",
    "exec",
    "f_locals",
    "locals",
    "vars",
}
# pytest has each assertion of a test ask for it, and keep nothing.
_OF_PYTEST = "@py_builtins"


def _may_share(names: Collection[str]) -> bool:
    shared = _SHARING.intersection(names)
    return bool(shared - {"locals"} if _OF_PYTEST in names else shared)


def variables_of(
    frame: FrameType, elsewhere: bool, snapshots: Optional[Set[int]] = None
) -> Optional[List[Tuple[str, Any]]]:
    """A function's local variables; None where reading them might change something.

    Before CPython 3.13 ``f_locals`` is a dict that the frame shares with whoever has
    asked for it, ``locals()`` or a trace function: reading it brings that up to date,
    and a trace function's is written back into the variables.

    Args:
        frame: of the function.
        elsewhere: whether it runs in another thread, of which it is not known whether
            it is traced: then they are left behind in it.
        snapshots: where to note the id of a dict that somebody else has.
    """
    if sys.version_info >= (3, 13):
        return list(frame.f_locals.items())
    if any(
        map(_is_in_python, (frame.f_trace, sys.gettrace(), sys.getprofile()))
    ) or _may_share(frame.f_code.co_names):
        return None
    variables = frame.f_locals
    found = list(variables.items())
    # It stays in the frame.  If nobody else has it, nobody misses what is in it: the
    # frame, the variable, the argument.
    if sys.getrefcount(variables) <= 3 and not elsewhere:
        variables.clear()
    elif snapshots is not None:
        snapshots.add(id(variables))
    return found


def _is_in_python(function: Any) -> bool:
    """Whether a trace or profile function is: one in C, as coverage's, shares none."""
    kind = type(function)
    return kind in (FunctionType, MethodType) or any(
        type(vars(each).get("__call__")) is FunctionType for each in mro_of(kind)
    )


def values_of(frame: FrameType) -> List[Any]:
    """What a function's variables hold, as far as the collector sees it."""
    known = (
        frame.f_back,
        frame.f_builtins,
        frame.f_code,
        frame.f_globals,
        frame.f_trace,
    )
    ids = set(map(id, known))
    return [each for each in gc.get_referents(frame) if id(each) not in ids]


def local_name(name: str) -> str:
    """How a function holds what a variable of its has."""
    return f"local variable {name!r}" if name else "local variable"


def _runs_elsewhere(frame: FrameType) -> bool:
    """Whether a frame is one of those that run in other threads."""
    tops = sys._current_frames()  # noqa: SLF001
    tops.pop(threading.get_ident(), None)  # which has this function's own
    for top in tops.values():
        running: Optional[FrameType] = top
        while running is not None:
            if running is frame:
                return True
            running = running.f_back
    return False


def _dict_of(each: Any) -> Optional[Dict[str, Any]]:
    try:
        attributes = object.__getattribute__(each, "__dict__")
    except Exception:  # a property of the application's, say
        return None
    return attributes if type(attributes) is dict else None


def is_dict_of(each: Any, owner: Any) -> bool:
    """Whether an object has its attributes in a dict."""
    if type(each) is not dict or type(owner) is ModuleType:
        return False
    return _dict_of(owner) is each


def _items(namespace: Dict[Any, Any]) -> Iterator[Tuple[Any, Any]]:
    """The items of a dict, read in one step: another thread may change it."""
    # Not list(dict.items()): making a million tuples runs the collector, and that
    # runs the application's finalizers.
    both = list(chain(dict.keys(namespace), dict.values(namespace)))
    half = len(both) // 2
    return zip(both[:half], both[half:])


def _key(namespace: Optional[Dict[Any, Any]], held: Any) -> Any:
    for key, value in _items(namespace or {}):
        if value is held:
            return key
    return None


# A name is shown if code has it.  Any other may be a value, such as one that a client
# has sent and setattr() was given.


def attribute_name(owner: Any, held: Any) -> str:
    """How an object holds what an attribute of its has."""
    name = _key(_dict_of(owner), held)
    if type(name) is str:
        for kind in mro_of(type(owner)):
            namespace, module = _namespace_of(kind), module_of(kind)
            annotations = namespace.get("__annotations__")
            if (
                (type(annotations) is dict and name in annotations)
                or name in _names_in(namespace.values(), module)
                or name in _names_in_module(module)
            ):
                return f"attribute {name!r}"
    return "an attribute"


def global_name(namespace: Dict[str, Any], held: Any) -> str:
    """How a module holds what a global has."""
    name = _key(namespace, held)
    module = dict.get(namespace, "__name__")
    if type(name) is str and name in _names_in(namespace.values(), module):
        return f"global {name!r}"
    return "a global"


def _names_in_module(name: Optional[str]) -> Set[str]:
    module = sys.modules.get(name or "")
    return (
        _names_in(vars(module).values(), name) if type(module) is ModuleType else set()
    )


def _names_in(values: Iterable[Any], module: object) -> Set[str]:
    """The names that are used by functions, and by those of a module's classes."""
    names: Set[str] = set()
    seen: Set[int] = set()
    walk = list(values)
    for each in walk:
        kind = type(each)
        if kind is CodeType:
            names.update(each.co_names)
            walk += each.co_consts
        elif id(each) in seen:
            continue
        elif kind is FunctionType:
            seen.add(id(each))
            walk += (each.__code__, each.__dict__.get("__wrapped__"))
        elif kind is classmethod or kind is staticmethod:
            walk.append(each.__func__)
        elif kind is property:
            walk += (each.fget, each.fset)
        elif issubclass(kind, type) and module_of(each) == module:
            seen.add(id(each))
            walk += _namespace_of(each).values()
    return names


def described(
    each: Any, modules: Dict[int, str]
) -> Tuple[str, Optional[str], Optional[int]]:
    """What an object is, and for a frame where."""
    if id(each) in modules:
        return f"module {modules[id(each)]}", None, None
    kind = type(each)
    if kind is FrameType:
        return frame_name(each), each.f_code.co_filename, each.f_lineno
    if is_resumable(each):
        code = _code_of(each)
        frame = frame_of(each)
        line = frame.f_lineno if frame is not None else code.co_firstlineno
        return f"{kind.__name__} {each.__qualname__}", code.co_filename, line
    if kind is FunctionType:
        code = each.__code__
        return (
            f"function {each.__qualname__}",
            code.co_filename,
            code.co_firstlineno,
        )
    if kind is MethodType:
        return f"method {_name_of(each.__func__)}", None, None
    if issubclass(kind, type):
        return f"class {type_name(each)}", None, None
    return type_name(kind), None, None


def _name_of(function: Any) -> str:
    kind = type(function)
    return function.__qualname__ if kind is FunctionType else type_name(kind)


def frame_name(frame: FrameType) -> str:
    """What a frame is called, after its function."""
    code = frame.f_code
    return f"frame of {getattr(code, 'co_qualname', code.co_name)}"


def how_held(holder: Any, held: Any) -> str:
    """How one object holds another, by name, and never by a value."""
    kind = type(holder)
    if kind is FrameType:
        return _how_frame(holder, held)
    if is_resumable(holder):
        return _how_resumable(holder, held)
    if kind is CellType:
        return "closure cell"
    if kind is FunctionType:
        return _how_function(holder, held)
    if kind is tuple and type(held) is CellType:
        return "closure"
    if kind is list or kind is tuple:
        for index, each in enumerate(holder):
            if each is held:
                return f"index {index}"
    if issubclass(kind, dict):
        return _how_dict(holder, held)
    attributes = _dict_of(holder)
    if attributes is held:
        return "attributes"
    if _key(attributes, held) is not None:
        return attribute_name(holder, held)
    return _how_by_descriptor(holder, held)


def _how_dict(holder: Any, held: Any) -> str:
    for key, value in _items(holder):
        if value is held:
            return f"value of a key of type {type_name(type(key))}"
        if key is held:
            return "key"
    return "holds"


def _how_frame(frame: FrameType, held: Any) -> str:
    variables: Optional[List[Tuple[str, Any]]] = []
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        elsewhere = sys.version_info < (3, 13) and _runs_elsewhere(frame)
        variables = None if elsewhere else variables_of(frame, False)
    for name, value in variables or ():
        if value is held or _is_cell_of(held, value):
            return local_name(name)
    if frame.f_back is held:
        return "f_back"
    return "temporary value" if variables is not None else local_name("")


def _is_cell_of(cell: Any, value: Any) -> bool:
    try:
        return type(cell) is CellType and cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _how_resumable(holder: Any, held: Any) -> str:
    frame = frame_of(holder)
    if frame is held:
        return "frame"
    for prefix in ("cr_await", "gi_yieldfrom", "ag_await"):
        if getattr(holder, prefix, None) is held:
            return "awaits"
    if frame is not None:
        name = _how_frame(frame, held)
        if name != "temporary value" or not issubclass(type(held), BaseException):
            return name
    return "exception in hand"


def _how_function(function: Any, held: Any) -> str:
    if function.__closure__ is held:
        names = ", ".join(map(repr, function.__code__.co_freevars))
        return f"closure over {names}"
    for name in ("__defaults__", "__kwdefaults__", "__globals__", "__wrapped__"):
        if getattr(function, name, None) is held:
            return name
    return "holds"


def _how_by_descriptor(holder: Any, held: Any) -> str:
    for kind in mro_of(type(holder)):
        # From CPython 3.12 on asyncio's tasks and futures have flags as ours do.
        in_c = not _flags_of(kind) & _HEAP or module_of(kind) == "_asyncio"
        for name, descriptor in list(_namespace_of(kind).items()):
            if name.startswith("__") and name not in _SPECIAL:
                continue
            if type(descriptor) is MemberDescriptorType or (
                in_c and type(descriptor) is GetSetDescriptorType
            ):
                try:
                    value = descriptor.__get__(holder)
                except Exception:  # a slot that is empty
                    continue
                if value is held:
                    return name if in_c else f"attribute {name!r}"
    return "holds"
