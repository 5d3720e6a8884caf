"""What was run on what: the facts of the data, of the checkpoints, and of the run that scored them."""

from __future__ import annotations

import re
from typing import Any

from eval import figures
from eval.report_input import Results, as_list, counted, filter_text, listed
from eval.report_tables import num_text


def provenance(results: Results) -> dict[str, Any]:
    """Return the facts of the last section: pairs for tables, lists, and texts to fold away."""
    run, dataset = results.run, results.dataset
    first = results.scores[0]
    data = [("Name", first.dataset), ("Content hash", first.dataset_hash), ("Split scored", listed(_splits(results)))]
    data += [("Subjects, recordings scored", num_text(results.scores).removeprefix("n = ").rstrip("."))]
    counts = dataset.get("counts")
    if isinstance(counts, dict):
        rows = []
        for split, entry in counts.items():
            what = ", ".join(f"{v} {k}" for k, v in entry.items()) if isinstance(entry, dict) else str(entry)
            rows.append(f"{split}: {what}")
        data.append(("Splits", "; ".join(rows)))
    atlas = dataset.get("atlas")
    if atlas:
        named = atlas if not isinstance(atlas, dict) else ", ".join(f"{k} {_short(v)}" for k, v in atlas.items())
        data.append(("Atlas", str(named)))
    if results.tr_s is not None:
        data.append(("TR", f"{results.tr_s:g} s"))
    data.append(("Temporal filter", filter_text(results).removeprefix("Temporal filter: ").rstrip(".")))
    sources = sorted({s.statistics_from for s in results.scores})
    data.append(
        ("Median and IQR of the model input", f"from the {listed(sources)} (column in the table of all records)")
    )
    known = {
        "name",
        "content_hash",
        "counts",
        "atlas",
        "tr_s",
        "filter",
        "high_pass_hz",
        "low_pass_hz",
        "flags",
        "warnings",
    }
    data += [(k.replace("_", " "), _plain(v)) for k, v in dataset.items() if k not in known and v != {}]
    checkpoints = []
    for info in run.get("checkpoints") or []:
        manifest = info.get("manifest") if isinstance(info.get("manifest"), dict) else {}
        pairs = [("Path", str(info.get("path") or info.get("folder") or "not recorded"))]
        if info.get("weights_sha256"):
            pairs.append(("Weights, sha256", str(info["weights_sha256"])))
        if figures.is_number(info.get("num_parameters")):
            pairs.append(("Parameters", counted(int(info["num_parameters"]), "weight")))
        pairs += [(k.replace("_", " "), _plain(v)) for k, v in manifest.items() if not isinstance(v, dict | list)]
        pairs += [
            (name.replace("_", " "), _plain(info[name]))
            for name in ("statistics_from", "num_seen_subjects")
            if name in info
        ]
        if isinstance(manifest.get("versions"), dict):
            pairs.append(("Versions at training", _plain(manifest["versions"])))
        if isinstance(info.get("config"), dict):
            pairs.append(("Configuration", _plain(info["config"])))
        checkpoints.append((str(info.get("name", "checkpoint")), pairs))
    how = []
    git = run.get("git")
    if isinstance(git, dict):
        changed = ", with files that differ from it" if git.get("dirty") else ""
        how.append(("Git commit", f"{git.get('commit')}{changed}"))
    for name in ("command", "git_commit", "started", "finished"):
        if run.get(name):
            value = run[name]
            how.append(
                (
                    name.replace("_", " ").capitalize(),
                    " ".join(map(str, value)) if isinstance(value, list) else str(value),
                )
            )
    if run.get("versions"):
        how.append(("Versions", _plain(run["versions"])))
    durations = next((run[name] for name in ("seconds", "durations") if run.get(name)), None)
    seconds = durations if isinstance(durations, dict) else {"total": durations} if durations is not None else {}
    return {
        "absent": [] if run else ["run.json is not there: only what the scores themselves carry is known."],
        "data": data,
        "flags": as_list(dataset.get("flags")),
        "warnings": as_list(dataset.get("warnings")),
        "checkpoints": checkpoints,
        "how": how,
        "durations": [(k, f"{v:.1f} s" if figures.is_number(v) else _plain(v)) for k, v in seconds.items()],
        "config": _yaml(run["config"]) if isinstance(run.get("config"), dict) else "",
    }


def _splits(results: Results) -> list[str]:
    """Name the split that is scored, with its tasks where there are several."""
    tasks: dict[str, list[str]] = {}
    for score in results.scores:
        tasks.setdefault(score.split, [])
        if score.task not in tasks[score.split]:
            tasks[score.split].append(score.task)
    return list(tasks) if len(tasks) == 1 else [f"{split} ({listed(names)})" for split, names in tasks.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return "none" if value is None else str(value)


def _short(value: Any) -> str:
    text = _plain(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _yaml(tree: Any) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, width=110, allow_unicode=True)
