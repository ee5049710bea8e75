"""The columns of every results file: types, constraints and what they mean.

`datapackage.json` is generated from these, and reading checks against them, so that a file
is described in one place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date
from typing import Any

SOURCES = ("paper", "cost", "proxy", "paper_scale", "smoke")
TASKS = ("detection", "instances", "classification", "segmentation")
RUN_STATES = ("finished", "partial")
PROFILE_NAMES = ("smoke", "proxy", "paper")

ITEM_PATTERN = r"(table|figure)-[0-9]{2}"
RUN_PATTERN = r"[0-9a-f]{12}"

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Field:
    """One column: a Frictionless field type with its constraints.

    An empty cell is a missing value; `required` forbids it.
    """

    name: str
    type: str
    description: str
    required: bool = False
    enum: tuple[str, ...] = ()
    pattern: str = ""
    minimum: int | None = None

    def problem(self, text: str) -> str | None:
        """Say what is wrong with the cell `text`, or None."""
        if text == "":
            return "is empty" if self.required else None
        wrong_type = _type_problem(self.type, text)
        if wrong_type:
            return f"{text!r} {wrong_type}"
        if self.enum and text not in self.enum:
            return f"{text!r} is not one of {', '.join(self.enum)}"
        if self.pattern and not re.fullmatch(self.pattern, text):
            return f"{text!r} does not match {self.pattern}"
        if self.minimum is not None and float(text) < self.minimum:
            return f"{text!r} is below {self.minimum}"
        return None

    def descriptor(self) -> dict[str, Any]:
        """Give the field as Frictionless describes it."""
        constraints: dict[str, Any] = {}
        if self.required:
            constraints["required"] = True
        if self.enum:
            constraints["enum"] = list(self.enum)
        if self.pattern:
            constraints["pattern"] = self.pattern
        if self.minimum is not None:
            constraints["minimum"] = self.minimum
        field: dict[str, Any] = {
            "name": self.name,
            "type": self.type,
            "description": self.description,
        }
        if constraints:
            field["constraints"] = constraints
        return field


@dataclass(frozen=True)
class Schema:
    """The columns of one kind of file, in order, and those that identify a row."""

    name: str
    fields: tuple[Field, ...]
    primary_key: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names in the order of the file."""
        return tuple(field.name for field in self.fields)

    def descriptor(self) -> dict[str, Any]:
        """Give the schema as Frictionless describes it."""
        return {
            "fields": [field.descriptor() for field in self.fields],
            "missingValues": [""],
            "primaryKey": list(self.primary_key),
        }


def _type_problem(kind: str, text: str) -> str | None:
    if kind == "number" and not _NUMBER.fullmatch(text):
        return "is not a number"
    if kind == "integer" and not _INTEGER.fullmatch(text):
        return "is not a whole number"
    if kind == "date" and not _is_date(text):
        return "is not a date such as 2026-01-31"
    if kind == "object" and not _is_json_object(text):
        return "is not a JSON object"
    return None


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


_ITEM = Field("item", "string", "Table or figure of the paper.", True, pattern=ITEM_PATTERN)
_ROW = Field("row", "string", "Row of the table, as the paper labels it.", True)
_MODEL = Field("model", "string", "Name for create_model; empty where this library has none.")
_METRIC = Field("metric", "string", "What was measured, for example AP50 or multi_adds.", True)
_UNIT = Field(
    "unit", "string", "Unit of the value: B is 1e9 multi-adds, M is 1e6 parameters, flag is 0 or 1."
)
_COMMIT = Field(
    "commit", "string", "Commit of this repository; +dirty if its code had local changes."
)
_DATE = Field("date", "date", "The day it was recorded, UTC.")

MEASUREMENT = Schema(
    "measurement",
    (
        _ITEM,
        _ROW,
        _MODEL,
        Field("task", "string", "What the model was built for.", enum=TASKS),
        _METRIC,
        Field("value", "number", "The number; empty where it is undefined or was not printed."),
        _UNIT,
        Field(
            "source",
            "string",
            "paper: transcribed; cost: counted on the built model; proxy, paper_scale, smoke: "
            "measured by a run of that profile.",
            True,
            enum=SOURCES,
        ),
        Field("seed", "integer", "Seed of the run; empty where none was used.", minimum=0),
        Field("data", "string", "Data set that the value was measured on."),
        Field("run", "string", "Key of the run in runs.csv.", pattern=RUN_PATTERN),
        _COMMIT,
        _DATE,
        Field("note", "string", "Anything a reader must know about this row."),
    ),
    ("item", "row", "model", "metric", "source", "seed"),
)

RUN = Schema(
    "run",
    (
        Field("run", "string", "Hash of the full configuration.", True, pattern=RUN_PATTERN),
        Field("state", "string", "partial: stopped before its last step.", True, enum=RUN_STATES),
        Field("model", "string", "Name for create_model.", True),
        Field("task", "string", "What the model was built for.", True, enum=TASKS),
        Field("profile", "string", "Profile that the run belongs to.", True, enum=PROFILE_NAMES),
        Field("seed", "integer", "Seed of weights, order and augmentation.", True, minimum=0),
        Field("steps", "integer", "Optimiser steps taken.", minimum=0),
        Field("images", "integer", "Training images seen, repeats included.", minimum=0),
        Field(
            "wall_seconds", "number", "Training and evaluation, interruptions left out.", minimum=0
        ),
        Field("images_per_second", "number", "Training images over the training time.", minimum=0),
        Field("precision", "string", "Number format of the forward pass."),
        Field("threads", "integer", "Processor threads given to the run.", minimum=1),
        Field("hardware", "string", "Processor or accelerator."),
        Field("python", "string", "Version of Python."),
        Field("torch", "string", "Version of torch."),
        Field("torchvision", "string", "Version of torchvision."),
        Field("config", "object", "The full configuration as JSON; its hash is the run key."),
        _COMMIT,
        _DATE,
    ),
    ("run",),
)

MISPRINT = Schema(
    "misprint",
    (
        _ITEM,
        _ROW,
        _MODEL,
        _METRIC,
        Field("printed", "number", "The number as printed; empty where the print lost it."),
        Field("corrected", "number", "The number that the reason supports.", True),
        _UNIT,
        Field("reason", "string", "The arithmetic or comparison that shows the misprint.", True),
    ),
    ("item", "row", "metric"),
)

CLAIM = Schema(
    "claim",
    (
        Field("claim", "string", "Identifier of the statement.", True, pattern=r"[a-z0-9-]+"),
        Field("section", "string", "Where the paper states it.", True),
        Field("statement", "string", "The statement in other words.", True),
        Field("operation", "string", "Arithmetic over the cells; see the README.", True),
        Field(
            "cells",
            "string",
            "Cells as item|row|metric, separated by semicolons; * stands for any text.",
            True,
        ),
        Field("argument", "number", "Constant that the operation needs, if any."),
        Field(
            "relation",
            "string",
            "How the computed value must stand to the stated one.",
            True,
            enum=("equals", "around", "between", "less_than", "more_than"),
        ),
        Field("stated_low", "number", "The number stated, or the lower end of its range.", True),
        Field("stated_high", "number", "The upper end of a stated range."),
        _UNIT,
        Field("note", "string", "How the statement was read, and what else bears on it."),
    ),
    ("claim",),
)

# Metric of a cost -> what its printed unit stands for, and the unit.
COST_UNITS = {"multi_adds": (1e9, "B"), "parameters": (1e6, "M")}

COST = Schema(
    "cost",
    (
        Field(
            "item", "string", "Table that prints the number; empty if none.", pattern=ITEM_PATTERN
        ),
        Field("row", "string", "Row of the table, as the paper labels it; empty if none."),
        Field("model", "string", "Name for create_model.", True),
        Field("task", "string", "What the model was built for.", True, enum=TASKS),
        Field("metric", "string", "What was counted.", True, enum=("multi_adds", "parameters")),
        Field("options", "string", "Options of create_model that the row switches."),
        Field("image_size", "integer", "Side of the square image in pixels.", True, minimum=1),
        Field("num_classes", "integer", "Classes of the model.", True, minimum=1),
        Field("measured", "number", "Counted on the built model.", True),
        Field("printed", "number", "The paper's number, as printed; empty if it prints none."),
        _UNIT,
        Field("difference_percent", "number", "Measured over printed, less 100 %."),
        Field("rests_on", "string", "Choices that the paper leaves open and this number needs."),
        Field("note", "string", "Why the two differ, or what was tried."),
        _COMMIT,
        _DATE,
    ),
    ("item", "row", "model", "task", "metric"),
)

CHOICE = Schema(
    "choice",
    (
        Field(
            "scan",
            "string",
            "set: a whole set of answers; one, pair: that many answers changed in it.",
            True,
            enum=("set", "one", "pair"),
        ),
        Field("around", "string", "The set of answers.", True),
        Field("choice", "string", "What was chosen; of a pair, two joined by +; empty for a set."),
        Field("value", "string", "The answer; of a pair, two joined by +."),
        Field("chosen", "string", "Whether the set has this answer.", True, enum=("yes", "no")),
        Field("cells_within_3_percent", "integer", "Printed cells met within 3 %.", True),
        Field("cells_as_printed", "integer", "Cells met to the digits printed.", True),
        Field("cells", "integer", "Printed cells compared.", True),
        Field("mean_deviation_percent", "number", "Mean absolute deviation.", True),
        Field("worst_cell", "string", "The cell that is missed most: item, row, metric.", True),
        Field("worst_deviation_percent", "number", "By how much, with its sign.", True),
    ),
    ("scan", "around", "choice", "value"),
)

PARITY = Schema(
    "parity",
    (
        Field("model", "string", "Name for create_model.", True),
        Field("image_size", "integer", "Side of the square image in pixels.", True, minimum=1),
        Field("quantity", "string", "What is compared: a level, a head, a loss.", True),
        Field("measure", "string", "How the two are compared.", True),
        Field("value", "number", "The difference.", True),
        Field("limit", "number", "The difference that is allowed.", True),
        Field("passed", "string", "Whether it is within.", True, enum=("true", "false")),
    ),
    ("model", "quantity"),
)

EVALUATION = Schema(
    "evaluation",
    (
        Field("weights", "string", "First 12 digits of the file's SHA-256.", True),
        _MODEL,
        Field("task", "string", "What the model was built for.", True, enum=TASKS),
        Field("image_size", "integer", "Side of the square input in pixels.", True, minimum=1),
        Field("data", "string", "Data set and part.", True),
        Field("images", "integer", "Images evaluated.", True, minimum=1),
        _METRIC,
        Field("value", "number", "The number; empty where it is undefined."),
        Field("published", "number", "What the authors of the weights publish, if they do."),
        _UNIT,
        Field("origin", "string", "Where the weights come from.", True),
        _COMMIT,
        _DATE,
    ),
    ("weights", "image_size", "data", "images", "metric"),
)

REFERENCE = "reference"  # in a method's place: distributions that no method chose
SEARCH_METHODS = ("ppo", "reinforce", "random", "evolution", REFERENCE)
TRIAL_STATES = ("finished", "duplicate", "failed")

SEARCH_TRIAL = Schema(
    "search_trial",
    (
        Field("method", "string", "Who chose the sample.", True, enum=SEARCH_METHODS),
        Field("seed", "integer", "Seed of the method and of the trial's run.", True, minimum=0),
        Field("trial", "integer", "Number of the sample, from 0.", True, minimum=0),
        Field("step", "integer", "Batch of samples that it belongs to, from 0.", True, minimum=0),
        Field(
            "state",
            "string",
            "duplicate: same run as an earlier trial, whose AP it has; failed: twice.",
            True,
            enum=TRIAL_STATES,
        ),
        Field("betas", "string", "Of the 18 blocks (Equation 4), such as 10-10-5.", True),
        Field("feature_dims", "string", "Of the 18 blocks at the scale D0.", True),
        Field("multi_adds_d0", "integer", "Multi-Adds at the scale D0, 512x512, 90 classes.", True),
        Field("parameters_d0", "integer", "Parameters at the scale D0, 90 classes.", True),
        Field("multi_adds", "integer", "Multi-Adds of the model that was trained.", True),
        Field("parameters", "integer", "Parameters of the model that was trained.", True),
        Field("AP", "number", "On the held-out images, percent; empty where the trial failed."),
        Field("reward", "number", "What the method learned from; empty where it failed."),
        Field("entropy", "number", "Of a choice, nats, when sampled; empty without a policy."),
        Field("attempts", "integer", "How often it was started.", True, minimum=0),
        Field("seconds", "number", "Training and evaluation.", minimum=0),
        Field(
            "precision",
            "string",
            "Number format of the forward pass; empty where it failed or is not known.",
            enum=("float32", "bfloat16"),
        ),
        Field("run", "string", "Hash of the full configuration.", True, pattern=RUN_PATTERN),
        Field("setting", "string", "What was trained, on what, by which recipe.", True),
        Field("note", "string", "Why it failed, or whose result a duplicate has."),
        _COMMIT,
        _DATE,
    ),
    ("method", "seed", "trial"),
)

SPACE = Schema(
    "space",
    (
        Field("claim", "string", "Identifier of the statement.", True, pattern=r"[a-z0-9-]+"),
        Field("section", "string", "Where the paper states it; empty where it does not."),
        Field("statement", "string", "What is counted.", True),
        Field("equation", "string", "Equation 2 as used.", True, enum=("exact", "approximate")),
        Field("stated", "string", "What the paper says; empty where nothing."),
        Field("computed", "number", "Counted on the samples.", True),
        _UNIT,
        Field("verdict", "string", "Empty where nothing is stated.", enum=("holds", "mismatch")),
        Field("samples", "integer", "Distributions drawn uniformly.", True, minimum=1),
        _COMMIT,
        _DATE,
    ),
    ("claim", "equation"),
)

MEASUREMENT_COLUMNS = MEASUREMENT.columns
RUN_COLUMNS = RUN.columns
