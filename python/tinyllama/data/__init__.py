"""From text to token shards: reading documents, checking and mending them, encoding them."""

from .documents import SEPARATOR, Documents
from .mending import Report, check
from .shards import prepare

__all__ = ["SEPARATOR", "Documents", "Report", "check", "prepare"]
