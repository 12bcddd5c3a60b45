"""What does the upstream patch stop, on the aiohttp that is installed?

``nox -s backport`` runs this.  aiohttp is copied, and the copy is changed, as 3.11.14
was, by the pull requests 10569, the server, and 10556, the client; ``verify``
runs on that.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import aiohttp

# file, what stands there, what comes in its place; each is there once.
PATCH = (
    (
        "web_protocol.py",
        r"        handler = asyncio.current_task\(loop\)\n.*\n",
        "",
    ),
    (
        "web_protocol.py",
        r"(self\._request_factory\(message, payload, self, writer, )handler\)",
        r"\1self._task_handler or asyncio.current_task(loop))",
    ),
    (
        "web_protocol.py",
        r"( {12}finally:\n)( {16}if self\.transport is None and resp)",
        r"\1                request._task = None\n\2",
    ),
    (
        "client_proto.py",
        r"(    def close\(self\) -> None:\n)",
        r"\1        self._exception = None\n",
    ),
)


def patch(package: pathlib.Path) -> None:
    """Change a copy of aiohttp."""
    for name, old, new in PATCH:
        file = package / name
        text, times = re.subn(old, new, file.read_text("utf-8"))
        if times != 1:
            raise SystemExit(f"{name} of aiohttp {aiohttp.__version__} is not known")
        file.write_text(text, "utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "aiohttp")
        shutil.copytree(pathlib.Path(aiohttp.__file__).parent, copy)
        patch(copy)
        verify = [sys.executable, "-m", "aiohttp_cyclebreak", "verify", *sys.argv[1:]]
        sys.exit(subprocess.run(verify, env={"PYTHONPATH": folder}).returncode)
