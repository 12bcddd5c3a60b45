"""What holds for every test."""

import gc
import logging
from typing import Iterator, List

import pytest

from aiohttp_cyclebreak import calls, complaints, internals, options
from aiohttp_cyclebreak.exceptions import detach

from .service import Records


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """Take what there is already out of the hundreds of collections to come."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def log() -> Iterator[List[str]]:
    """What the library logs."""
    records = Records()
    logger = logging.getLogger("aiohttp_cyclebreak")
    logger.addHandler(records)
    yield records.lines
    logger.removeHandler(records)


@pytest.fixture(autouse=True)
def _no_complaint(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failure in the library is swallowed, and must not be here."""
    complaints._complaints.clear()
    yield
    complained = set(complaints._complaints)
    complaints._complaints.clear()
    if "expects_complaint" not in request.keywords:
        assert not complained


@pytest.fixture(autouse=True)
def _nothing_is_logged_yet() -> None:
    """The switch is logged once in a process."""
    options._logged.clear()


@pytest.fixture(autouse=True)
def _calls_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client_cyclebreak() has all requests of the process looked at for calls."""
    monkeypatch.setattr(calls, "are_followed", False)


@pytest.fixture(autouse=True)
def _nothing_was_read_too_late() -> Iterator[None]:
    """The one exception of all released responses keeps requests of the test before."""
    yield
    error = internals.error_of_released()
    if error is not None:
        detach(error)
