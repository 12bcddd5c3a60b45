"""What holds for every test beside another tool."""

import gc
from typing import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _only_new_objects_are_counted(_thaw: None) -> None:
    """The tools' own hundreds of thousands would be looked at for every count."""
    gc.collect()
    gc.freeze()
