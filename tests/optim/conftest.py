"""Disk homes of these tests are streamed."""

import pytest


@pytest.fixture(autouse=True)
def _in_slabs(in_slabs: None) -> None:
    """Tiles are read and written: small files would be worked on in the page cache."""
