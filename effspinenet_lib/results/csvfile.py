"""Former names of `tables`."""

from effspinenet_lib.results.tables import (
    Row,
    number_text,
    read_rows,
    to_frame,
    to_row,
    write_rows,
)

__all__ = ["Row", "number_text", "read_rows", "to_frame", "to_row", "write_rows"]
