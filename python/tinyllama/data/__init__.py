"""From text to token shards: reading documents, checking and mending them, encoding them."""

from .check import Report, check
from .documents import SEPARATOR, Documents
from .prepare import prepare

__all__ = ["SEPARATOR", "Documents", "Report", "check", "prepare"]
