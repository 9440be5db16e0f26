"""The good rows of a CSV file: whole blocks at once where they are clear, row by row where they are not."""

from __future__ import annotations

from collections.abc import Iterator

from moeplace.errors import TraceError
from moeplace.files import InputFile
from moeplace.readers._columns import tally
from moeplace.readers._common import BadRows
from moeplace.readers._csv_blocks import Rows, Unclear, clear_rows, rows_of
from moeplace.readers._csv_lines import Lines, Record, count_lines, pass_header, read_records
from moeplace.readers._csv_rows import Row, RowParser
from moeplace.readers._meta import Shape

CHUNK_BYTES = 1 << 18
# a block that is not clear is cut down to this before it is read row by row: bad rows are few
UNCLEAR_BYTES = 1 << 15
_ROUNDED = "a score rounded to 0 hides a choice: write more digits"


class RowWalk:
    """One walk over the good rows of a file, each with its whole top-k.

    Parameters
    ----------
    source
        The file.
    parser
        Reads its rows; nothing has been read with it.
    shape
        Its top-k is settled from the first good row, unless nobody knows which token the rows are of.
    bad
        Tally of the bad rows; more than it may hold are an error.
    """

    def __init__(self, source: InputFile, parser: RowParser, shape: Shape, bad: BadRows) -> None:
        self._source, self._parser, self._shape, self._bad = source, parser, shape, bad
        self._layout = parser.layout
        self._top_k = 1 if self._layout.only_counts else shape.top_k

    def blocks(self, num_bytes: int) -> Iterator[Rows]:
        """Yield blocks of rows, of text of about ``num_bytes`` or less.

        Raises
        ------
        TraceError
            More rows are bad than may be skipped, or the file cannot be read as CSV.
        """
        most = size = max(1, min(num_bytes, CHUNK_BYTES))
        with self._source.stream() as stream:
            lines = Lines(stream, self._source.name)
            pass_header(lines, self._layout.delimiter, self._layout.header)
            while True:
                data, whole = lines.ahead(size)
                if not data:
                    break
                try:
                    rows, used = clear_rows(data, lines.number + 1, whole, self._parser, self._top_k)
                except Unclear:
                    if size > UNCLEAR_BYTES:
                        size = UNCLEAR_BYTES
                        continue
                    careful = list(self._careful(lines, lines.number + count_lines(data)))
                    if careful:
                        yield rows_of(careful)
                    continue
                self._settle(rows.ids.shape[1])
                lines.skip(used)
                size = min(most, 2 * size)
                yield rows
        self._bad.check()

    def _settle(self, top_k: int) -> None:
        if self._top_k is None:
            self._shape.set_top_k(top_k)
            self._top_k = top_k

    def _careful(self, lines: Lines, last: int) -> Iterator[Row]:
        """Read row by row up to line ``last``, or as far as the last row or top-k goes on; tally the bad rows."""
        for record, row in self._joined(lines, last) if self._layout.joins else self._single(lines, last):
            self._settle(len(row.ids))
            if len(row.ids) == self._top_k:
                yield row
                continue
            layout = self._layout
            said = (f"{len(row.ids)} experts: {row.ids}", f"top-{self._top_k} in every row")
            index = layout.ids if layout.ids is not None else (layout.numbered or (layout.expert or 0,))[0]
            error = self._parser.error(record, index, 0, (*said, _ROUNDED if layout.matrix else None))
            tally(self._bad, error, self._source.name)

    def _single(self, lines: Lines, last: int) -> Iterator[tuple[Record, Row]]:
        """Yield good rows."""
        for record, row in self._good(lines):
            yield record, row
            if lines.number >= last:
                return

    def _joined(self, lines: Lines, last: int) -> Iterator[tuple[Record, Row]]:
        """Join consecutive rows of one choice each into the top-k of one token and layer."""
        current: tuple[Record, Row] | None = None
        for record, row in self._good(lines):
            if current is None or row[1:6] != current[1][1:6]:
                if record.line > last:
                    lines.put_back(record)
                    break
                if current is not None:
                    yield current
                current = record, row
                continue
            try:
                self._parser.check(record, [*current[1].ids, *row.ids], self._layout.expert or 0)
            except TraceError as exc:
                tally(self._bad, exc, self._source.name)
                continue
            current[1].ids.extend(row.ids)
        if current is not None:
            yield current

    def _good(self, lines: Lines) -> Iterator[tuple[Record, Row]]:
        for record in read_records(lines, self._layout.delimiter):
            try:
                row = self._parser.parse(record)
            except TraceError as exc:
                tally(self._bad, exc, self._source.name)
                continue
            yield record, row
