# SPDX-License-Identifier: Apache-2.0
"""Data files -> checked rows. A record that cannot be used becomes a `BadRow` that names it; none is lost, and a column
that no record used is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.rows.columns import columns_in
from data.rows.media import Folders
from data.rows.records import decoded, read_records
from data.rows.row import RowReader
from data.rows.sources import open_source, source_names
from megatron_rl.types import BadRow, Row

Turns = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How records are read. `columns`: the columns that a recipe names, by field (columns.NAMES); `turns`: which turns
    of the assistant are answers, each a row of its own."""

    columns: Mapping[str, str] = field(default_factory=dict)
    turns: Turns = "last"


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set as it was read. `unused_columns`: those from which nothing was taken in any record.

    absent: columns that the recipe names and no usable record has, as "videos=clip"
    num_plain_marks: rows without media whose text has marks such as <video>, which are words there
    is_whole: False where a limit left records unread
    """

    name: str
    rows: list[Row]
    bad: list[BadRow]
    unused_columns: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    num_plain_marks: int = 0
    is_whole: bool = True

    def notes(self) -> list[str]:
        """What the user should know although no row is at fault."""
        found = []
        if self.unused_columns:
            shown = ", ".join(self.unused_columns)
            found.append(f"{self.name}: columns that nothing uses: {shown} (data.columns names columns)")
        found += [f"{self.name}: data.columns.{named}: no record has it" for named in self.absent]
        if self.num_plain_marks:
            what = "rows without media whose text has marks such as <video>, which are words there"
            found.append(f"{self.name}: {what}: {self.num_plain_marks}")
        return found


def read_rows(
    setting: str,
    media_root: str,
    embedded: Path,
    field: str = "data.train",
    form: RowFormat | None = None,
    limit: int = 0,
    on_record: Callable[[], None] = lambda: None,
) -> list[DataSet]:
    """Each data set that `setting` lists (sources.py), its rows in the order of its files.

    Relative media paths are resolved against `media_root`, or the folder of the data set. Media that a data file holds
    itself are written to the folder `embedded`. `limit` > 0 reads only the first records of each data set. `on_record`
    is called for each record. Raises ValueError for what stands in the way of a whole data set.
    """
    root = Path(media_root).expanduser()
    if media_root and not root.is_dir():
        raise ValueError(f"data.media_root={media_root}: no such folder; give the folder that holds the videos")
    found = []
    for name in source_names(setting):
        source = open_source(name, field)
        reader = _Reader(Folders(root.absolute() if media_root else source.root, embedded.absolute()), form, limit)
        for file in source.files:
            reader.read(file, f"{field}={name}", on_record)
        found.append(reader.data_set(name))
    return found


class _Reader:
    """Reads the files of one data set."""

    def __init__(self, folders: Folders, form: RowFormat | None, limit: int):
        self._folders, self._form, self._limit = folders, form or RowFormat(), limit
        self._rows: list[Row] = []
        self._bad: list[BadRow] = []
        self._columns: dict[str, bool] = {}  # whether a record used it; in the order in which they were met
        self._num_records = self._num_plain_marks = 0
        self._is_whole = True

    def read(self, file: Path, setting: str, on_record: Callable[[], None]) -> None:
        for number, record in read_records(file, setting):
            if self._limit and self._num_records >= self._limit:
                self._is_whole = False
                return
            self._num_records += 1
            on_record()
            source = f"{file.name}:{number}"
            try:
                self._add(decoded(record) if isinstance(record, bytes) else record, source)
            except ValueError as error:
                self._bad.append(BadRow(source, str(error)))

    def _add(self, record: object, source: str) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, found {type(record).__name__}")
        reader = RowReader(record, self._form.columns, self._folders)
        self._rows += reader.rows(source, every_answer=self._form.turns == "all")
        for column in reader.columns:
            self._columns[column] = self._columns.get(column, False) or column in reader.used
        self._num_plain_marks += reader.has_plain_marks

    def data_set(self, name: str) -> DataSet:
        unused = tuple(column for column, is_used in self._columns.items() if not is_used)
        named = self._form.columns if self._rows else {}
        absent = tuple(
            f"{field}={text}" for field, text in named.items() if not self._columns.keys() & set(columns_in(text))
        )
        return DataSet(name, self._rows, self._bad, unused, absent, self._num_plain_marks, self._is_whole)
