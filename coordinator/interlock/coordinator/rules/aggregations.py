"""Aggregations of a vector by groups of labels. Pure; the semantics are Prometheus'."""

from __future__ import annotations

import math
import struct

import numpy as np

from interlock.broker.samples import NAME, Labels
from interlock.coordinator.rules.expression import Aggregate
from interlock.coordinator.rules.hashing import xxh64
from interlock.coordinator.rules.labelsets import Ids, LabelTable, replaced
from interlock.coordinator.rules.reductions import REDUCTIONS, quantiles
from interlock.coordinator.rules.relabel import written
from interlock.coordinator.rules.values import EvaluationError, Flags, Floats, Ints, Vector, empty, grouped

MAX_HASH = float(2**64 - 1)


def group_keys(table: LabelTable, expression: Aggregate, keys: Ids) -> Ids:
    """The label set of the group that each element belongs to."""
    if expression.without:
        return table.without((*expression.labels, NAME))(keys)
    return table.only(expression.labels)(keys)


def numbered(keys: Ids) -> tuple[Ids, Ints]:
    """(the distinct ones in the order of their first appearance, the number of each)."""
    distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse]


def reduced(table: LabelTable, expression: Aggregate, vector: Vector, parameter: float | None) -> Vector:
    """sum, avg, min, max, count, group, stddev, stdvar, quantile: one element for each group."""
    if not len(vector):
        return empty()
    keys, groups = numbered(group_keys(table, expression, vector.keys))
    order, runs = grouped(groups, vector.values)
    if expression.op == "quantile":
        values = quantiles(math.nan if parameter is None else parameter, runs)
    else:
        values = REDUCTIONS[expression.op](runs)
    dropped: Flags = np.logical_or.reduceat(vector.dropped[order], runs.starts)
    return Vector(keys, values, dropped)


def counted(table: LabelTable, expression: Aggregate, vector: Vector, label: str) -> Vector:
    """count_values: how many elements of each group have each value, which becomes a label."""
    if not len(vector):
        return empty()
    keys = group_keys(table, expression, vector.keys)
    labelled = [
        replaced(table.sets[key], label, written(value))
        for key, value in zip(keys.tolist(), vector.values.tolist(), strict=True)
    ]
    distinct, groups = numbered(table.ids(labelled))
    return Vector(distinct, np.bincount(groups).astype(float), np.zeros(len(distinct), bool))


def ranked(table: LabelTable, expression: Aggregate, vector: Vector, parameter: float) -> Vector:
    """topk, bottomk, limitk, limit_ratio: some elements of each group, as they are."""
    if expression.op == "limit_ratio":
        return _sampled(table, vector, parameter)
    if math.isnan(parameter):
        raise EvaluationError("Parameter value is NaN")
    if abs(parameter) >= 2.0**63:
        raise EvaluationError(f"Scalar value {parameter:g} {'over' if parameter > 0 else 'under'}flows int64")
    wanted = int(parameter)
    if wanted < 1 or not len(vector):
        return empty()
    _, groups = numbered(group_keys(table, expression, vector.keys))
    values = vector.values
    if expression.op == "limitk":
        order = np.argsort(groups, kind="stable")
    else:
        rank = values if expression.op == "bottomk" else -values
        order = np.lexsort((rank, np.isnan(values), groups))
    ordered = groups[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return vector.take(order[place < wanted])


def _sampled(table: LabelTable, vector: Vector, ratio: float) -> Vector:
    """A share of the series, always the same ones; a negative share is what the positive one leaves."""
    if math.isnan(ratio):
        raise EvaluationError("Ratio value is NaN")
    ratio = max(-1.0, min(1.0, ratio))
    offsets = np.array([xxh64(label_bytes(table.sets[key])) / MAX_HASH for key in vector.keys.tolist()])
    return vector.take(offsets < ratio if ratio >= 0 else offsets >= 1.0 + ratio)


def label_bytes(labels: Labels) -> bytes:
    """A label set as Prometheus keeps it, and hashes it."""
    out = bytearray()
    for pair in labels:
        for text in pair:
            raw = text.encode()
            out += bytes([len(raw)]) if len(raw) < 255 else b"\xff" + struct.pack("<I", len(raw))[:3]
            out += raw
    return bytes(out)


def sorted_by_value(vector: Vector, *, descending: bool) -> Vector:
    values: Floats = -vector.values if descending else vector.values
    return vector.take(np.lexsort((values, np.isnan(values))))
