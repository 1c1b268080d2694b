"""Shared fixtures."""

import os
from pathlib import Path

import pytest

# Waiting threads sleep instead of spinning, so that tests stay fast when the cores are shared.
# It has to be set before the extension is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and weights that lies beside a development checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder of real data beside the checkout, which is not there")
    return SHARED
