"""The columns of the record that `python -m benchmarks` writes."""

from __future__ import annotations

from effspinenet_lib.results.schemas import Field, Schema

UNITS = ("ratio", "percent", "images/s", "GMAC/s", "GB/s", "MiB", "ms")

SPEED = Schema(
    "speed",
    (
        Field("benchmark", "string", "Which of the benchmarks measured it.", True),
        Field("what", "string", "What was measured.", True),
        Field("settings", "string", "Number format, image size, batch and the like."),
        Field("value", "number", "The figure; a ratio above 1 says that this library is faster."),
        Field("unit", "string", "Of the value.", True, enum=UNITS),
        Field("goal", "number", "The least that the ratio was to reach; empty if none was set."),
        Field("ours", "number", "Median milliseconds of this library."),
        Field("peer", "number", "Median milliseconds of what it is compared with."),
        Field("lowest", "number", "Of the paired ratios."),
        Field("highest", "number", "Of the paired ratios."),
        Field("pairs", "integer", "How often the two were timed in turn.", minimum=1),
        Field("threads", "integer", "Threads of each timed process.", True, minimum=1),
        Field("load", "number", "Programs waiting for the processor, mean of the last minute."),
        Field("hardware", "string", "Processor.", True),
        Field("torch", "string", "Version of torch.", True),
        Field("commit", "string", "Commit of this repository; +dirty if it had local changes."),
        Field("date", "date", "The day it was measured, UTC."),
    ),
    ("benchmark", "what", "settings"),
)
