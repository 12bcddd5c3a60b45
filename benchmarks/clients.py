"""The load: plain sockets, in another process than the one that is measured."""

import asyncio
import socket
import time
from collections import deque
from typing import Any, Deque, List, Sequence

GET = {
    "success": b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "failure": b"GET /fail HTTP/1.1\r\nHost: localhost\r\n\r\n",
}
STATUS = {"success": b"200", "failure": b"400"}


def length_of(answer: bytes) -> int:
    """How long the answer will be, 0 as long as that is not known."""
    head, end, _ = answer.partition(b"\r\n\r\n")
    if not end:
        return 0
    _, _, length = head.lower().partition(b"content-length:")
    return len(head) + len(end) + int(length.partition(b"\r\n")[0])


def check(answer: bytes, status: bytes) -> None:
    if answer[9:12] != status:
        raise RuntimeError(f"expected {status!r}, not {answer[:200]!r}")


async def upload(
    port: int, number: int, at_a_time: int, size: int, keep_alive: bool, over: float
) -> List[float]:
    """POST bodies that are refused, on kept connections or each on one of its own.

    The clients begin one after the other, *over* so many seconds: otherwise the slowest
    requests would be those of the first burst, whatever serves them.

    Returns:
        For each, the seconds from connecting or sending to the end of the answer.
    """
    loop = asyncio.get_running_loop()
    request = (
        b"POST /fail HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
    ) + bytes(size)
    taken: List[float] = []
    left = iter(range(number))

    async def one_after_another(delay: float) -> None:
        sock = None
        await asyncio.sleep(delay)
        for _ in left:
            start = time.perf_counter()
            if sock is None:
                sock = socket.socket()
                sock.setblocking(False)
                # As any client does.  The end of a body waited 40 ms otherwise, now and
                # then, for an acknowledgement that the other side puts off.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, request)
            answer = b""
            while len(answer) < (length_of(answer) or len(answer) + 1):
                received = await loop.sock_recv(sock, 65536)
                if not received:
                    raise ConnectionError("the server closed the connection")
                answer += received
            if not keep_alive:
                sock.close()
                sock = None
            taken.append(time.perf_counter() - start)
            check(answer, b"400")
        if sock is not None:
            sock.close()

    delays = [over * client / at_a_time for client in range(at_a_time)]
    await asyncio.gather(*map(one_after_another, delays))
    return taken


class Connection(asyncio.Protocol):
    """A kept connection: one request at a time, the others wait for their turn."""

    def __init__(self) -> None:
        self._due: Deque[Any] = deque()
        self._received = b""
        self._length = 0
        self.taken: List[float] = []
        self.error: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, kind: str, done: Any) -> None:
        """Send a request as soon as the earlier ones are answered."""
        self._due.append((time.perf_counter(), kind, done))
        if len(self._due) == 1:
            self._transport.write(GET[kind])

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data
        if not self._length:
            self._length = length_of(received)
        if not self._length or len(received) < self._length:
            return
        start, kind, done = self._due.popleft()
        # From when it was due: who has to wait for the one before waits as well.
        self.taken.append(time.perf_counter() - start)
        if received[9:12] != STATUS[kind]:
            self.connection_lost(RuntimeError(f"{kind}: {received[:200]!r}"))
        self._received = b""
        self._length = 0
        if self._due:
            self._transport.write(GET[self._due[0][1]])
        done()

    def connection_lost(self, exc: Any) -> None:
        self.error = exc or ConnectionError("the server closed the connection")

    def close(self) -> None:
        self._transport.abort()


class Load:
    """Connections that are kept open, and what was answered on them."""

    def __init__(self, connections: List[Connection]) -> None:
        self._connections = connections
        self._waiting = 0
        self._all_answered: Any = None

    @classmethod
    async def connect(cls, port: int, number: int) -> "Load":
        loop = asyncio.get_running_loop()
        connections = []
        for _ in range(number):
            _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
            connections.append(connection)
        return cls(connections)

    def _ask(self, index: int, kind: str) -> None:
        self._waiting += 1
        self._connections[index % len(self._connections)].ask(kind, self._answered)

    def _answered(self) -> None:
        self._waiting -= 1
        if not self._waiting and self._all_answered is not None:
            self._all_answered.set_result(None)

    async def _end(self) -> List[float]:
        loop = asyncio.get_running_loop()
        if self._waiting:
            self._all_answered = loop.create_future()
            await asyncio.wait([self._all_answered], timeout=60)
            self._all_answered = None
        taken: List[float] = []
        for connection in self._connections:
            if connection.error is not None:
                raise connection.error
            taken += connection.taken
            connection.taken = []
        if self._waiting:
            raise TimeoutError(f"{self._waiting} requests were not answered")
        return taken

    async def at_rate(
        self, kinds: Sequence[str], rate: float, seconds: float
    ) -> List[float]:
        """Send at a fixed rate, whether or not the server keeps up.

        Returns:
            For each request, the seconds from when it was due to its answer.
        """
        start = time.perf_counter()
        sent = 0
        while sent < rate * seconds:
            due = (time.perf_counter() - start) * rate
            while sent < min(due, rate * seconds):
                self._ask(sent, kinds[sent % len(kinds)])
                sent += 1
            await asyncio.sleep(0.001)
        return await self._end()

    async def batch(self, kind: str, number: int) -> None:
        """Send one request after another on each connection, up to a number."""
        number = -(-number // len(self._connections))
        for connection in range(len(self._connections)):
            for _ in range(number):
                self._ask(connection, kind)
        await self._end()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
