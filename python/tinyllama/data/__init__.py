"""From text to token shards: reading documents, checking and mending them, encoding them."""

from .checking import Report, check
from .documents import SEPARATOR, Documents
from .shards import prepare

__all__ = ["SEPARATOR", "Documents", "Report", "check", "prepare"]
