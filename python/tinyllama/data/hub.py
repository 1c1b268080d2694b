"""Data sets of the Hugging Face Hub, and local ones, read through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FormatError, MissingExtraError

PREFIX = "hf:"
SETTINGS = ("config", "split", "revision")


class HubDataset:
    """One split of a data set: ``hf:NAME[,config=C][,split=S][,revision=R]``.

    NAME is ``owner/name`` on the hub, or a folder that ``datasets.load_dataset`` reads or
    ``save_to_disk`` wrote. The split is ``train`` unless another is named. Records are streamed:
    nothing is kept on disk.

    ``open`` has to be called once. It raises OSError when the data set cannot be found or
    reached, ArgumentError for a config or split that it lacks, MissingExtraError without
    ``datasets``.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.name, *settings = spec[len(PREFIX) :].split(",")
        if not self.name:
            raise ArgumentError(f"{spec}: a data set's name is expected after {PREFIX}")
        values: dict[str, str] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in SETTINGS or not value:
                known = ", ".join(f"{key}=…" for key in SETTINGS)
                raise ArgumentError(f"{spec}: {setting!r} is unknown; known: {known}")
            values[key] = value
        self.config, self.revision = values.get("config"), values.get("revision")
        self.split = values.get("split", "train")
        self._dataset: Any = None

    def __str__(self) -> str:
        return self.spec

    def open(self) -> None:
        """Look the data set up; no record is read yet."""
        try:
            import datasets
        except ImportError:
            raise MissingExtraError("datasets", "data") from None
        try:
            if _was_saved_to_disk(Path(self.name)):
                self._dataset = self._choose(datasets.load_from_disk(self.name))
            else:
                self._dataset = datasets.load_dataset(
                    self.name,
                    self.config,
                    split=self.split,
                    revision=self.revision,
                    streaming=True,
                )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: {error}") from None
        except OSError as error:
            raise OSError(f"{self}: {error}") from None
        except (ValueError, KeyError) as error:
            raise ArgumentError(f"{self}: {error}") from None

    def _choose(self, saved: Any) -> Any:
        """The split of what was saved to disk."""
        for name in ("config", "revision"):
            if getattr(self, name):
                raise ValueError(f"a folder that was saved has no {name}")
        if isinstance(saved, dict):
            return saved[self.split]
        if self.split not in ("train", str(saved.split)):
            raise ValueError(f"holds a single split, {saved.split or 'without a name'}")
        return saved

    @property
    def columns(self) -> list[str] | None:
        """The names of a record's fields, where the data set tells them beforehand."""
        names: list[str] | None = self._dataset.column_names
        return names

    def records(self, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """The records in order, with no more than ``columns`` where the fields are known.

        Raises FormatError for damaged data, OSError when the hub cannot be reached any more.
        """
        dataset = self._dataset
        if self.columns is not None and columns is not None:
            dataset = dataset.select_columns(list(columns))  # others may be pictures or sound
        try:
            yield from dataset
        except OSError as error:
            raise OSError(f"{self}: {error}") from None
        except ValueError as error:  # pyarrow's are ValueErrors too
            raise FormatError(f"{self}: damaged data: {error}") from None


def _was_saved_to_disk(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
