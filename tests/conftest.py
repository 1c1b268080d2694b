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


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token folder of made-up stories, for runs that train. No test writes into it."""
    from tiny_training import write_tokens

    return write_tokens(tmp_path_factory.mktemp("tokens"))
