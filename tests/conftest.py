"""Shared fixtures."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and weights that lies beside a development checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder of real data beside the checkout, which is not there")
    return SHARED
