"""The shape of a results file, checked before anything is read from one."""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 1

_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))

_DOCUMENT = {"schema_version": int, "context": dict, "peaks": dict, "results": list}
_CONTEXT = {
    "date": str,
    "command": str,
    "seed": int,
    "versions": dict,
    "build": dict,
    "torch": dict,
    "cpu": dict,
    "environment": dict,
}
_MATCH = {
    "run": str,
    "repro": str,
    "op": str,
    "direction": str,
    "shape": str,
    "dtype": str,
    "family": str,
    "labels": list,
    "count": int,
    "recorded": bool,
    "flops": _NUMBER,
    "bytes": _NUMBER,
    "probes": list,
    "contestants": list,
}
_PROBE = {"kind": str, "threads": int, "samples": list, "median": _OPTIONAL}
_CONTESTANT = {"who": str, "layout": str, "threads": int, "status": str, "reason": str}
_TIMED = {
    "samples_s": list,
    "inner": int,
    "median_s": _NUMBER,
    "iqr_share": _NUMBER,
    "min_s": _NUMBER,
    "error": dict,
    "gflops": _OPTIONAL,
    "gbs": _OPTIONAL,
    "peak_share": _OPTIONAL,
    "copy_share": _OPTIONAL,
}
_OURS = {"isa": str, "algorithm": str}
_OURS_TIMED = {"kernel": str, "ratios": dict, "best_torch": _OPTIONAL}


def problems(document: Any) -> list[str]:
    """What is wrong with a results file, one sentence each; empty if nothing is."""
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        return [f"schema_version: expected {SCHEMA_VERSION}"]
    found = _check("", document, _DOCUMENT)
    if found:
        return found
    found += _check("context.", document["context"], _CONTEXT)
    for i, match in enumerate(document["results"]):
        where = f"results[{i}]."
        wrong = _check(where, match, _MATCH)
        found += wrong
        if wrong:
            continue
        for j, probe in enumerate(match["probes"]):
            found += _check(f"{where}probes[{j}].", probe, _PROBE)
        for j, entry in enumerate(match["contestants"]):
            found += _check_contestant(f"{where}contestants[{j}].", entry)
    return found


def _check_contestant(where: str, entry: Any) -> list[str]:
    found = _check(where, entry, _CONTESTANT)
    if found:
        return found
    ours, timed = entry["who"] == "fastconv", entry["status"] in ("ok", "noisy")
    if ours:
        found += _check(where, entry, _OURS)
    if timed:
        found += _check(where, entry, _TIMED | (_OURS_TIMED if ours else {}))
    elif "median_s" in entry or "samples_s" in entry:
        found.append(f"{where}status is {entry['status']}, yet the row has times")
    return found


def _check(where: str, record: Any, fields: dict[str, Any]) -> list[str]:
    if not isinstance(record, dict):
        return [f"{where.rstrip('.')}: expected an object"]
    return [
        f"{where}{name}: " + ("missing" if name not in record else f"got {type(record[name]).__name__}")
        for name, kind in fields.items()
        if name not in record or not isinstance(record[name], kind)
    ]
