"""The results of ``muki_clinc.py``: judged answers, means over seeds, paired differences, tables.

Knows the files in ``scores/`` and no model.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from muki_clinc_texts import GROUPS, Row, domains_of
from results_csv import append

Runs = dict[str, dict[int, dict[str, Any]]]  # by name and seed


def judge(values: np.ndarray, labels: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the accuracy of logits or probabilities [N,U] of ``labels`` [U] among all labels; by
    group; and within each group, where only the labels of the text's own group can be answered.
    """
    groups = domains_of(rows)
    number = {label: place for place, label in enumerate(labels)}
    gold = np.array([number[row["label"]] for row in rows])
    right = values.argmax(axis=1) == gold
    found: dict[str, Any] = {"accuracy": float(right.mean()), "by group": {}, "within group": {}}
    for group, domains in groups.items():
        own = np.array([row["domain"] in domains for row in rows])
        places = np.unique(gold[own])
        inside = places[values[own][:, places].argmax(axis=1)] == gold[own]
        found["by group"][group] = float(right[own].mean())
        found["within group"][group] = float(inside.mean())
    return found


def judged_runs(work: Path, names: Sequence[str]) -> Runs:
    """Return the judged runs of these ``names``, in their order."""
    found: Runs = {name: {} for name in names}
    for file in sorted((work / "scores").glob("*.json")):
        one = json.loads(file.read_text())
        if one.get("name") in found:
            found[one["name"]][one["seed"]] = one
    return {name: runs for name, runs in found.items() if runs}


def rows_of(work: Path, runs: Runs) -> list[dict[str, Any]]:
    """Return one row per merge, kind of student and oracle."""
    on_test, on_seen = (
        json.loads((work / "scores" / f"{name}.json").read_text()) for name in ("merged", "targets")
    )
    rows = [
        {"kind": "experts", "name": name, "seeds": 1, "targets": on_seen[name]["accuracy"]} | one
        for name, one in on_test.items()
    ]
    for name, by_seed in runs.items():
        each = list(by_seed.values())
        row = {"kind": "oracle" if "oracle" in name else "student", "name": name}
        row |= {"seeds": len(each), "seconds": statistics.fmean(r["seconds"] for r in each)}
        for key in ("by group", "within group"):
            row[key] = {g: statistics.fmean(r[key][g] for r in each) for g in GROUPS}
        rows.append(row | spread([one["accuracy"] for one in each]))
    return rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and, for two or more values, the sample deviation and 95 % t-interval of the
    mean.
    """
    found: dict[str, Any] = {"accuracy": statistics.fmean(values), "sd": None, "interval": None}
    if len(values) > 1:
        found["sd"] = statistics.stdev(values)
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * found["sd"] / len(values) ** 0.5
        found["interval"] = [found["accuracy"] - half, found["accuracy"] + half]
    return found


def differences(runs: Runs, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return one minus the other, paired by seed, for pairs that have a seed in common."""
    found = []
    for one, other in pairs:
        common = sorted(runs.get(one, {}).keys() & runs.get(other, {}).keys())
        each = [runs[one][s]["accuracy"] - runs[other][s]["accuracy"] for s in common]
        if not each:
            continue
        varies = len(set(each)) > 1  # otherwise there is nothing to test
        p = float(scipy.stats.ttest_1samp(each, 0.0).pvalue) if varies else None
        found.append({"of": one, "minus": other, "seeds": len(each), "p": p, **spread(each)})
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables, in per cent."""
    lines = [
        "| what answers | seeds | 150-way | 95 % interval | groups 1 / 2 / 3, 150-way | within the "
        "group | on the students' texts |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in found["rows"]]
    lines += ["", "| paired by seed | seeds | difference, points | 95 % interval | p |"]
    lines += ["|---|---|---|---|---|"]
    for row in found["differences"]:
        p = "–" if row["p"] is None else f"{row['p']:.2g}"
        name = f"{row['of']} − {row['minus']}"
        lines.append(
            f"| {name} | {row['seeds']} | {_value(row, '+')} | {_interval(row, '+')} | {p} |"
        )
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    by_group = " / ".join(f"{100 * v:.1f}" for v in row["by group"].values())
    inside = {g: v for g, v in row["within group"].items() if row["name"] == f"{g} alone"}
    inside = inside or (row["within group"] if "alone" not in row["name"] else {})
    within = " / ".join(f"{100 * v:.1f}" for v in inside.values())
    targets = f"{100 * row['targets']:.1f}" if "targets" in row else "–"
    name = f"student: {row['name']}" if row["kind"] == "student" else row["name"]
    return _cells(name, row["seeds"], _value(row), _interval(row), by_group, within, targets)


def _cells(*values: object) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def _value(row: Mapping[str, Any], sign: str = "") -> str:
    deviation = f" ± {100 * row['sd']:.2f}" if row.get("sd") is not None else ""
    return f"{100 * row['accuracy']:{sign}.2f}{deviation}"


def _interval(row: Mapping[str, Any], sign: str = "") -> str:
    if row.get("interval") is None:
        return "–"
    low, high = row["interval"]
    return f"{100 * low:{sign}.2f} … {100 * high:{sign}.2f}"


def write_csv(found: Mapping[str, Any], size: str) -> None:
    """Append the tables to results.csv."""
    packages = ("torch", "transformers")
    versions = "; ".join(f"{name} {found['versions'][name]}" for name in packages)
    rows = [
        (f"{size}, {case}", name, metric, round(value, 5), "")
        for case, name, metric, value in _csv_values(found)
    ]
    append(rows, "muki-clinc", found["device"], versions)


def _csv_values(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    for row in found["rows"]:
        for metric in ("accuracy", "sd", "seeds", "targets"):
            if row.get(metric) is not None:
                yield row["kind"], row["name"], metric, row[metric]
    for row in found["differences"]:
        name = f"{row['of']} - {row['minus']}"
        for metric, key in (("difference", "accuracy"), ("sd", "sd"), ("p", "p")):
            if row[key] is not None:
                yield "paired", name, metric, row[key]
