"""CPython x aiohttp, and what else has to hold before a release.

``nox`` alone runs what has to pass on every change and is an error where an
interpreter is missing; ``nox -s tests`` runs the whole matrix.
"""

import glob
import tempfile

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|venv"
nox.options.error_on_missing_interpreters = True
nox.options.tags = ["main"]

PYTHONS = ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13")
SUSPECT = "3.10.11"  # the last release for CPython 3.8
NEWEST = "newest"

# (CPython, aiohttp): the main entries first.
MAIN = (
    ("3.8", SUSPECT),
    ("3.11", SUSPECT),
    ("3.13", SUSPECT),
    ("3.11", NEWEST),
)
MATRIX = (
    *((python, SUSPECT) for python in PYTHONS),
    # Both sides of each change to what a request is held by.
    ("3.8", "3.8.1"),
    ("3.11", "3.8.6"),
    ("3.11", "3.9.5"),
    ("3.11", "3.10.0"),
    ("3.11", "3.10.10"),
    ("3.11", "3.11.13"),
    ("3.11", "3.11.18"),
    ("3.11", "3.12.15"),
    ("3.11", "3.13.5"),
    ("3.12", "3.9.5"),  # which closes no transport that was lost
    ("3.12", "3.11.13"),
    ("3.13", NEWEST),
)


def entries(tagged=True):
    """Give the matrix as parameters of a session, each entry once."""
    for python, aiohttp in dict.fromkeys(MAIN + MATRIX):
        tags = ["main"] if tagged and (python, aiohttp) in MAIN else []
        name = f"py{python}-aiohttp{aiohttp}"
        yield nox.param(python, aiohttp, True, id=name, tags=tags)
    yield nox.param("3.11", SUSPECT, False, id=f"py3.11-aiohttp{SUSPECT}-pure")


# Tests of what touches no release of aiohttp, and of what is read and written.
NO_AIOHTTP = (
    *("tests/test_sever.py", "tests/test_chains.py", "tests/test_naming.py"),
    "tests/test_cli.py",
)
HTTP = (
    *("tests/test_leaks.py", "tests/test_middleware.py", "tests/test_server.py"),
    *("tests/test_hostile_clients.py", "tests/test_release_body.py"),
)


def requirement(aiohttp):
    """Give what to install for one version of aiohttp."""
    return "aiohttp" if aiohttp == NEWEST else f"aiohttp=={aiohttp}"


@nox.session
@nox.parametrize(("python", "aiohttp", "extensions"), tuple(entries()))
def tests(session, aiohttp, extensions):
    """Run the tests; all of them beside aiohttp 3.10.11 on the main entries.

    Elsewhere uvloop is left out, what starts processes, and what takes long; beside
    other releases of aiohttp what does not touch it; and without C extensions all but
    what reads and writes HTTP.  What starts processes is run on CPython 3.8, and on
    3.11 by the README's command, on the newest.
    """
    session.install("-e", ".[test]", requirement(aiohttp))
    env = {} if extensions else {"AIOHTTP_NO_EXTENSIONS": "1"}
    which = session.posargs
    everything = extensions and (session.python, aiohttp) in MAIN and aiohttp != NEWEST
    if not which and not everything:
        which = ["-m", "not processes and not thorough", "-k", "not uvloop"]
        if not extensions:
            which += HTTP
        elif aiohttp != SUSPECT:
            which += [f"--ignore={name}" for name in NO_AIOHTTP]
    elif not which and session.python != "3.8":
        which = ["-m", "not processes"]
    session.run("python", "-c", "import aiohttp; print('aiohttp', aiohttp.__version__)")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *which, env=env)


# Beside the real tools that people use.
COMPANY = (("3.8", SUSPECT), ("3.11", SUSPECT), ("3.13", NEWEST))


@nox.session(tags=["main"])
@nox.parametrize(
    ("python", "aiohttp"), COMPANY, ids=[f"py{p}-aiohttp{a}" for p, a in COMPANY]
)
def company(session, aiohttp):
    """Run beside error reporters, tracers, add-ons and servers: docs/safety.rst."""
    session.install("-e", ".[test,company]", requirement(aiohttp))
    session.run("python", "-c", "import aiohttp; print('aiohttp', aiohttp.__version__)")
    tests = session.posargs or ["tests/company"]
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *tests)


# Those of aiohttp's own tests that a server or a client session takes part in.
UPSTREAM = (
    *("classbasedview", "client_functional", "client_session", "client_ws_functional"),
    *("connector", "proxy_functional", "run_app", "test_utils", "tracing"),
    *("urldispatch", "web_*", "worker"),
)
UPSTREAM_NEEDS = (
    *("pytest", "pytest-mock", "pytest-timeout", "pytest-xdist", "Brotli"),
    *("freezegun", "proxy.py", "python-on-whales", "re-assert", "trustme"),
)


@nox.session
@nox.parametrize(
    ("python", "aiohttp"),
    COMPANY[1:],  # bare, some of them fail on CPython 3.8
    ids=[f"py{p}-aiohttp{a}" for p, a in COMPANY[1:]],
)
def upstream(session, aiohttp):
    """Run aiohttp's own tests of servers and clients, guarded: docs/safety.rst."""
    newer = ("blockbuster", "isal", "zlib-ng") if aiohttp == NEWEST else ()
    needs = ("pip", requirement(aiohttp), *UPSTREAM_NEEDS, *newer)
    session.install("-e", ".", *needs)
    source = ("--no-deps", "--no-binary", "aiohttp", requirement(aiohttp))
    run = ("pytest", "-q", "-n", "2", "--timeout", "100", "--rootdir", ".")
    run += ("-c", "/dev/null", "-W", "error", "-W", "ignore::DeprecationWarning")
    run += ("-W", "ignore::pytest.PytestUnknownMarkWarning")
    run += ("-W", "ignore:Unclosed client session:ResourceWarning")
    # Root may read everything, and an application that is guarded has a middleware.
    run += ("-k", "not without_read_permission and not test_app_run_middlewares")
    path = session.invoked_from + "/tests/upstream"
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        session.run("python", "-m", "pip", "download", "-q", *source)
        (archive,) = glob.glob("*.tar.gz")
        unpack = ("tar", "-xzf", archive, "--strip-components", "1")
        session.run(*unpack, "--exclude", "*/aiohttp", external=True)  # installed
        for name in UPSTREAM:
            run += tuple(sorted(glob.glob(f"tests/test_{name}.py")))
        session.run(*run)
        for guarded in ("cyclebreak", "everything"):
            env = {"GUARDED": guarded, "PYTHONPATH": path}
            session.run(*run, "-p", "guard_everything", env=env)


@nox.session(python="3.11")
def soak(session):
    """Serve for minutes, and look for what grows; try many exception graphs."""
    session.install("-e", ".[test]", requirement(SUSPECT))
    session.run("python", "-m", "tests.soak", *session.posargs)
    session.run(
        "python",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/test_properties.py",
        "tests/test_interleavings.py",
        env={"CYCLEBREAK_HYPOTHESIS": "soak"},
    )


@nox.session(tags=["main"])
def lint(session):
    """Check the format, the usual mistakes and the spelling."""
    session.install(".[lint]")
    session.run("ruff", "format", "--check", "--diff", ".")
    session.run("ruff", "check", ".")
    session.run("codespell")


@nox.session(python="3.11", tags=["main"])
@nox.parametrize("aiohttp", (SUSPECT, NEWEST), ids=("suspect", "newest"))
def mypy(session, aiohttp):
    """Check the types, on both sides of every branch for a version of CPython."""
    session.install("-e", ".[cli,lint,prometheus]", "pytest", requirement(aiohttp))
    # The oldest that mypy knows, and the newest that is supported.
    for target in ("3.10", "3.13"):
        session.run("mypy", "--python-version", target)


@nox.session(python="3.11", tags=["main"])
def docs(session):
    """Build the documentation; a warning is an error."""
    session.install("-e", ".[cli,docs]")
    session.run("sphinx-build", "-W", "-n", "-q", "-E", "docs", "docs/_build/html")


@nox.session
@nox.parametrize(("python", "aiohttp", "extensions"), tuple(entries(False))[:-1])
def matrix(session, aiohttp, extensions):
    """Fill in docs/matrix.json, one column an entry; nox -s matrix for all of it."""
    session.install("-e", ".", requirement(aiohttp))
    session.run("python", "docs/matrix.py")


@nox.session(python="3.11")
def pictures(session):
    """Draw docs/pictures; it needs Graphviz's dot."""
    for aiohttp in (SUSPECT, "3.10.10"):  # the last one that has CVE-2024-52303
        session.install("-e", ".", requirement(aiohttp))
        session.run("python", "docs/pictures.py", *session.posargs)


@nox.session(python="3.11")
def applications(session):
    """Test three applications of others, bare and guarded: docs/keep_it_out.rst."""
    others = ("aiohttp-devtools==1.1.2", "aiohttp-tus==1.1.0", "pytest-aiohttp")
    session.install("-e", ".", requirement(SUSPECT), "pip", *others)
    test = session.invoked_from + "/docs/examples/pytest_three_applications.py"
    session.chdir(session.create_tmp())
    source = ("--no-deps", "--no-binary", "aiohttp", requirement(SUSPECT))
    session.run("python", "-m", "pip", "download", "-q", *source)
    archive = f"aiohttp-{SUSPECT}"
    session.run("tar", "-xzf", f"{archive}.tar.gz", external=True)
    session.chdir(archive)  # examples is in it
    run = ("python", "-m", "pytest", "-q", "--rootdir", ".", "-c", "/dev/null")
    run += ("-o", "asyncio_mode=auto", "--import-mode=importlib", test)
    session.run(*run, success_codes=[1])  # bare, some of them fail
    session.run(*run, env={"GUARDED": "1"})


@nox.session(python="3.11")
def backport(session):
    """Show what the upstream patch stops on an aiohttp that is pinned."""
    session.install("-e", ".[cli]", requirement(SUSPECT))
    session.run("python", "docs/backport.py", *session.posargs)


@nox.session(python="3.11", tags=["main"])
def verify(session):
    """Show each leak of the catalogue, without us and with us."""
    session.install("-e", ".[cli]", requirement(SUSPECT))
    session.run("python", "-m", "aiohttp_cyclebreak", "verify", *session.posargs)


# What is compared, each pair in an environment of its own.
BENCH = [
    (python, aiohttp)
    for python in ("3.11", "3.13")
    for aiohttp in (SUSPECT, "3.11.18", NEWEST)
]


@nox.session(python="3.11")
def bench(session):
    """Measure what it costs and saves, for docs/performance.rst; it takes half an hour.

    ``-- --quick`` is rough, and writes nothing into docs/; ``-- load`` is one part
    (load, keepalive, overhead, scale), ``-- report`` only draws again.
    """
    session.install(".[bench]")
    folder = session.cache_dir / "bench"
    for python, aiohttp in BENCH:
        environment = folder / f"{python}-{aiohttp}"
        interpreter = environment / "bin" / "python"
        if not interpreter.exists():
            session.run(
                f"python{python}", "-m", "venv", str(environment), external=True
            )
        session.run(
            *(str(interpreter), "-m", "pip", "install", "-q", "-U"),
            *("-e", ".", "pyperf", requirement(aiohttp)),
            external=True,
        )
    session.run(
        *("python", "benchmarks/run.py", "--environments", str(folder)),
        *session.posargs,
    )
