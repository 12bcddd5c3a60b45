"""What was an outgoing call made with? By weak reference: it holds nothing alive."""

from typing import Any, Dict, List
from weakref import ref

from .internals import error_of_call
from .sever import frames_of, graph

__all__ = ("Calls",)

_MANY = 32


class Calls:
    """The connections and responses of the calls of one request, or of one task.

    Adding one is on the path of every call that succeeds: that is a weak reference
    and an entry of a dictionary.  Most of what is followed is gone before the next
    call, and what is dead is dropped whenever the number has doubled.
    """

    __slots__ = ("_made_with", "_many")

    def __init__(self) -> None:
        self._made_with: Dict[int, ref[Any]] = {}
        self._many = _MANY

    def add(self, each: Any) -> bool:
        """Follow a client's protocol, response or websocket.

        Returns:
            Whether it is time to look for errors: now and then.
        """
        made_with = self._made_with
        made_with[id(each)] = ref(each)
        if len(made_with) < self._many:
            return False
        self.forget_dead()
        return True

    def forget_dead(self) -> None:
        """Drop what is gone."""
        for key, found in list(self._made_with.items()):
            if found() is None:
                del self._made_with[key]
        self._many = max(_MANY, 2 * len(self._made_with))

    def errors(self) -> List[BaseException]:
        """What of those is still there keeps these exceptions, and they keep frames."""
        errors: List[BaseException] = []
        for found in list(self._made_with.values()):
            each = found()
            if each is None:
                continue
            error = error_of_call(each)
            # Each connection that ends is given one, which most often nobody raises.
            if error is not None and any(
                frame is not None for exc in graph(error) for frame in frames_of(exc)
            ):
                errors.append(error)
        return errors

    def unread(self) -> bool:
        """Whether a response is there whose body has not all come yet."""
        for found in list(self._made_with.values()):
            content = getattr(found(), "content", None)
            if content is not None and not content.is_eof():
                return True
        return False
