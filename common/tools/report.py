"""Tables and figures from run directories, beside the papers' numbers.

    python -m common.tools.report runs/                               tables to the screen; files to runs/report/
    python -m common.tools.report runs/ --watch 30                    what is going on, renewed every 30 seconds
    python -m common.tools.report runs/ --keep common/results.csv       results of these runs into the kept ones
    python -m common.tools.report --csv common/results.csv --readme README.md      README's tables, from kept results
    python -m common.tools.report --csv common/results.csv --forest .figures/differences.svg      and its figure

Writes report.md (what is printed), results.csv (one row per run; gives the same tables again) and the figures
curves-*.png, exchange-*.png, synthetic-*.png. Scores are D4RL-normalised; spread is the standard deviation over seeds,
n - 1. Over tasks: interquartile mean of all (task, seed) scores, 95% bootstrap interval, seeds redrawn in each task.
Differences to the backbone: mean over seeds and Student's 95% interval.

A run counts if it is finished and its files are whole and agree: final.json's scores are those of log.csv, the folder
is what args.json says, and seeds of one method on one task have equal settings (the majority's; without one, none
counts). What does not count is named with the reason, never averaged in. D4RL's tasks, shifted dynamics, stand-ins
(`<task>@<file>`) and all else (Minari, what is collected or packaged here) have tables of their own.
"""

import csv
import hashlib
import io
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from common import data, judge, run
from common.tools import watch

PUBLISHED = Path(data.__file__).with_name("published.csv")
METHODS = {  # file and what makes it another method -> method and backbone in published.csv
    "iql": ("base", "IQL"), "calql": ("base", "Cal-QL"), "calql calibrate=False": ("base", "CQL"),
    "pex": ("base", "PEX"), "apl": ("base", "APL"), "wsrl": ("base", "WSRL"),
    "so2": ("base", "SO2+OFF2ON"),
    "iql_dare": ("DARE", "IQL"), "calql_dare": ("DARE", "Cal-QL"),
    "iql_stratdiff": ("StratDiff", "IQL"), "calql_stratdiff": ("StratDiff", "Cal-QL"),
    "iql_synther": ("SynthER", "IQL"), "synther": ("SynthER", "Cal-QL"),
    "iql_edis": ("EDIS", "IQL"), "edis": ("EDIS", "Cal-QL"), "iql_cfdg": ("CFDG", "IQL"),
    "pex_cfdg": ("CFDG", "PEX"), "apl_cfdg": ("CFDG", "APL"),
    "calql_ad2s": ("AD2S", "Cal-QL"), "iql_ad2s": ("AD2S", "IQL"), "wsrl_ad2s": ("AD2S", "WSRL"),
    "calql_ad2s pgr=True": ("PGR", "Cal-QL"),
    "dual": ("DUAL", "IQL"), "calql_dual": ("DUAL", "Cal-QL"), "so2_dual": ("DUAL", "SO2+OFF2ON"),
    "diffql": ("Diff-QL", "IQL"), "dacer": ("DACER", "IQL"),
    "diffuser": ("Diffuser", "IQL"),
}  # fmt: skip
# not on IQL, in whose column DUAL's tables have them
STANDS_ON = {"diffql": "", "diffuser": "", "dacer": "diffql"}
ON = {"PEX": "IQL", "APL": "Cal-QL", "WSRL": "Cal-QL"}  # a backbone beside the one it comes from
SECTIONS = {
    "d4rl": "D4RL",
    "shifted": "Shifted dynamics (data of D4RL, scores with the shift's reference returns)",
    "other": "Other tasks (not comparable with D4RL's or with a paper)",
    "standin": "Stand-ins: `<task>@<file>`, a task with another dataset (not comparable with a paper)",
}
SCORES = {  # column of results.csv -> heading, metric in published.csv
    "offline": ("end of offline", "offline"), "final": ("final", "final"),
    "last4": ("mean of last 4", "last4"), "online_mean": ("online average", "average"),
}  # fmt: skip
COSTS = {
    "hours_offline": "offline h", "hours_online": "online h", "hours_other": "other h",
    "offline_per_s": "offline steps/s", "online_per_s": "online steps/s", "memory_gib": "peak GiB",
}  # fmt: skip
FIRST = "file", "env", "seed", "commit", "command", "flags", "settings", "device"
LAST = "curve", "problem"
WORDS = FIRST + LAST  # no numbers
COLUMNS = (*FIRST, *SCORES, *COSTS, *LAST)
NOT_SETTINGS = run.NOT_COMPARED | {"seed", "env"}  # may differ between seeds of one group, so may from_*
PHASES = "offline", "online"
MISSING = "–"
MARKERS = "<!-- results -->", "<!-- end results -->"
HEADLINE = "<!-- headline -->", "<!-- end headline -->"  # optional, in README's first lines
ENOUGH = 5  # pairs, for a verdict
RESAMPLES = 2_000
# the 97.5th percentile of Student's t with 1, 2, ... degrees of freedom
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

Row = dict[str, Any]  # of results.csv; a missing number is None


class Found(NamedTuple):
    """A run directory that is whole."""

    row: Row
    folder: Path
    settings: dict[str, Any]
    log: list[dict]  # of log.csv: phase, step, and what figures need


# ---- reading ----


def clean(text: object) -> str:
    """In one line that any terminal and file takes."""
    return " ".join(str(text).encode(errors="replace").decode().split())


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} is damaged") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is damaged")
    return value


def read_log(path: Path) -> list[dict]:
    """Lines of log.csv: phase, step and the numbers used here; ValueError if it is cut off or something else."""
    try:
        text = path.read_bytes().decode()
        lines = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (ValueError, csv.Error) as e:
        raise ValueError("log.csv is damaged") from e
    if not text.endswith("\n") or any(None in line or None in line.values() for line in lines):
        raise ValueError("log.csv is cut off")
    if not lines or not {"phase", "step"} <= set(lines[0]):
        raise ValueError("log.csv has no lines with phase and step")
    names = [k for k in lines[0] if k in ("step", "eval/score", "split/exchanged") or k[:5] == "time/"]
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append({"phase": line["phase"]} | {k: float(line[k]) for k in names if line[k] != ""})
        except ValueError as e:
            raise ValueError(f"log.csv, line {number}: {e}") from e
        if not math.isfinite(rows[-1].get("step", math.nan)):
            raise ValueError(f"log.csv, line {number}: no step")
        if not math.isfinite(rows[-1].get("eval/score", 0.0)):
            raise ValueError(f"score {rows[-1]['eval/score']} in log.csv, line {number}")
    return rows


def read_run(folder: Path) -> Found:
    """A finished run; ValueError with the reason if it is not one, or does not agree with itself."""
    file, env, seed = folder.absolute().parts[-3:]
    info = read_json(folder / "args.json")
    try:
        origins = {k: v["origin"] for k, v in info["settings"].items()}
        settings = {k: v["value"] for k, v in info["settings"].items()}
        name, dataset = settings["env"].replace("/", "_"), settings.get("dataset")
        filed = f"{name}@{Path(dataset).stem}" if dataset else name
        told = f"{filed}/seed{int(settings['seed'])}"
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError("args.json lacks settings") from e
    if told != f"{env}/{seed}":
        raise ValueError(f"args.json says {told}")
    if not (folder / "final.json").exists():
        raise ValueError("unfinished")
    final, log = read_json(folder / "final.json"), read_log(folder / "log.csv")
    scores = {p: [x["eval/score"] for x in log if x["phase"] == p and "eval/score" in x] for p in PHASES}
    if not scores["offline"]:
        raise ValueError("log.csv has no score of the offline phase")
    online = scores["online"] or scores["offline"][-1:]
    last = (scores["online"] or scores["offline"])[-4:]
    ours = [float(x) for x in (scores["offline"][-1], last[-1], np.mean(last), np.mean(online))]
    for key, value in zip(("offline_score", "final_score", "score_last4"), ours, strict=False):
        told = final.get(key)
        if not isinstance(told, int | float) or not math.isclose(told, value, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"{key} {str(told)[:20]} in final.json, {value:.6g} in log.csv")
    row = dict.fromkeys(COLUMNS) | {k: round(x, 4) for k, x in zip(SCORES, ours, strict=True)}
    final = {k: v for k, v in final.items() if isinstance(v, int | float) and math.isfinite(v)}
    hours = {k.removesuffix("_seconds"): v / 3600 for k, v in final.items() if k.endswith("_seconds")}
    for phase in PHASES:  # an imported phase has neither hours nor speed
        row[f"hours_{phase}"] = hours.pop(phase, None)
        speeds = [x[k] for x in log if (k := f"time/{phase}_steps_per_s") in x]
        row[f"{phase}_per_s"] = float(np.median(speeds)) if speeds else None
    row["hours_other"], row["memory_gib"] = sum(hours.values()), final.get("peak_memory_gib")
    row |= {k: float(f"{row[k]:.4g}") for k in COSTS if row[k] is not None}
    compared = {k: v for k, v in settings.items() if k not in NOT_SETTINGS and k[:5] != "from_"}
    compared["dataset sha256"] = str(info.get("dataset"))[:12]
    text = json.dumps(compared, sort_keys=True)
    row |= {k: clean(info.get(k, "unknown")) for k in ("commit", "command", "device")}
    row["command"] = re.sub(r"((?<!\S)|(?<==))/\S*/", "", row["command"])  # names of files, not places
    row["flags"] = clean(" ".join(f"{k}={settings[k]}" for k in compared if origins.get(k) == "flag"))
    row |= {"file": clean(file), "env": clean(env), "seed": str(settings["seed"]), "problem": ""}
    row["settings"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    row["curve"] = " ".join(  # of online scores, by step
        f"{x['step']:g}:{x['eval/score']:.4f}" for x in log if x["phase"] == "online" and "eval/score" in x
    )
    return Found(row, folder, compared | {"env": settings["env"], "dataset": dataset}, log)


def find(root: Path) -> tuple[list[Row], list[Found]]:
    """Every run directory below `root`: rows of results.csv, those with a problem included, and the runs that count."""
    rows, found = {}, []
    files = ("args.json", "final.json", "log.csv", "state.pt")
    for folder in sorted({path.parent for name in files for path in root.glob(f"**/{name}")}):
        try:
            found.append(read_run(folder))
            rows[folder] = found[-1].row
        except (ValueError, OSError, OverflowError) as e:
            reason = f"unreadable {Path(e.filename or '').name}" if isinstance(e, OSError) else str(e)
            reason = reason.replace("unreadable", "no") if isinstance(e, FileNotFoundError) else reason
            parts = map(clean, ("", "", *folder.absolute().parts)[-3:])
            known = dict(zip(("file", "env", "seed"), parts, strict=True))
            known["seed"] = re.sub(r"^seed(?=\d+$)", "", known["seed"])
            known["problem"] = clean(reason)[:160]
            rows[folder] = dict.fromkeys(WORDS, "") | dict.fromkeys((*SCORES, *COSTS)) | known
    settle(list(rows.values()), {x.row["settings"]: x.settings for x in found})
    for folder, row in rows.items():
        if row["problem"] and (above := folder.relative_to(root).parts[:-3]):
            row["problem"] += f" (in {clean('/'.join(above))})"
    return list(rows.values()), [x for x in found if not x.row["problem"]]


def method(row: Row) -> str:
    """The file, and the flag that makes it another method (CQL, PGR)."""
    flags = row["flags"].split()
    return next((k for k in METHODS if k.split()[0] == row["file"] and k.split()[-1] in flags), row["file"])


def by_flags(row: Row) -> str:
    """The file, and whatever flags it was run with: for ablations."""
    return f"{row['file']} {row['flags']}".rstrip()


def settle(
    rows: list[Row],
    settings: dict[str, dict],
    key: Callable[[Row], str] = method,
    once: tuple[str, ...] = ("seed",),
) -> None:
    """Give a problem to rows whose settings are not their group's, and to those with the same `once` as another.

    `settings` are those behind each hash, where they are known: then the problem names the differences.
    """
    for group in grouped(rows, key).values():
        votes = Counter(row["settings"] for row in group).most_common()
        best = votes[0][0]
        told = settings.get(best, {})
        seeds = set()
        for row in group:
            if len(votes) > 1 and votes[0][1] == votes[1][1]:
                other = settings.get(votes[1][0], {})
                row["problem"] = "settings differ between seeds, no majority" + difference(told, other)
            elif row["settings"] != best:
                own = settings.get(row["settings"], {})
                row["problem"] = f"settings are not those of {votes[0][1]} other runs" + difference(told, own)
            elif (this := tuple(row[k] for k in once)) in seeds:
                row["problem"] = "the same method, task and seed as another run"
            else:
                seeds.add(this)


def difference(a: dict, b: dict) -> str:
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in ("env", "dataset")]
    changed = [f"{k} {a.get(k)} / {b.get(k)}" for k in keys]
    return clean(": " + ", ".join(changed))[:200] if changed else ""


def section(env: str) -> str:
    task = data.TASKS.get(env)
    if task is None or task.source != "d4rl":
        return "standin" if "@" in env else "other"
    return "shifted" if re.search(r"-(friction|gravity|kinematic|morphology)-", env) else "d4rl"


def order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """`names` in the order of `known`, then the others by name."""
    rank = {k: i for i, k in enumerate(known)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def grouped(rows: Iterable[Row], key: Callable[[Row], str] = method) -> dict[tuple[str, str], list[Row]]:
    """(method, env) -> rows that count, by task, then method; `key` says what is another method."""
    rows = [row for row in rows if not row["problem"]]
    groups = defaultdict(list)
    for row in rows:
        groups[key(row), row["env"]].append(row)
    names, tasks = order((k for k, _ in groups), METHODS), order((k for _, k in groups), data.TASKS)
    return {(name, env): groups[name, env] for env in tasks for name in names if (name, env) in groups}


# ---- statistics ----


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the mean without the lowest and highest quarter."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap(strata: list[list[float]], resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """IQM of all scores and its 95% percentile interval; resampled within each stratum (the seeds of a task)."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(np.asarray(x), (resamples, len(x))) for x in strata]
    low, high = np.percentile(iqm(np.concatenate(drawn, 1)), [2.5, 97.5])
    return float(iqm(np.concatenate(strata))), float(low), float(high)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of `values` (those of the seeds) and Student's 95% interval; of one value that is everything.

    Not the bootstrap's, which with five seeds holds the mean of normal ones in 83 of 100 cases, ten in 90.
    """
    x, df = np.asarray(values), len(values) - 1
    mean = float(x.mean())
    if df == 0:
        return mean, -math.inf, math.inf
    z = 1.95996  # beyond the table: Cornish and Fisher's expansion in 1 / df
    beyond = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    half = (STUDENT[df - 1] if df <= len(STUDENT) else beyond) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def improvement(
    ours: list[float], theirs: list[float], resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Probability that a run of ours beats one of theirs, ties count half, and its 95% percentile interval.

    Mann-Whitney's statistic over all pairs of runs, each side resampled apart.  [rliable, Agarwal et al., NeurIPS 2021]
    """
    x, y = np.asarray(ours), np.asarray(theirs)
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    rng = np.random.default_rng(0)
    i, j = (
        rng.integers(len(x), size=(resamples, len(x), 1)),
        rng.integers(len(y), size=(resamples, 1, len(y))),
    )
    return float(wins.mean()), *(float(v) for v in np.percentile(wins[i, j].mean((1, 2)), [2.5, 97.5]))


# ---- tables ----


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines]) + "\n"


def cell(values: list[float | None], digits: str = ".1f", spread: bool = True) -> str:
    """Mean ± standard deviation; missing if any value is."""
    if None in values:
        return MISSING
    text = format(np.mean(values), digits)
    return f"{text} ± {np.std(values, ddof=1):{digits}}" if spread and len(values) > 1 else text


@cache
def published() -> dict[tuple[str, str, str], dict[str, dict[str, Row]]]:
    """(method, backbone, env) -> paper -> metric -> row of published.csv; a paper's first table of a number stands."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    with open(PUBLISHED, newline="") as f:
        for row in csv.DictReader(f):
            found[row["method"], row["backbone"], row["env"]][row["paper"]].setdefault(row["metric"], row)
    return found


def score_lines(groups: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    """A line for each method on each task, then one for each paper that has a number for it."""
    lines = []
    for (name, env), rows in groups.items():
        scores = [cell([row[k] for row in rows]) for k in SCORES]
        lines.append([env, f"`{name}`", str(len(rows)), *scores])
        for paper, metrics in published().get((*METHODS.get(name, ("", "")), env), {}).items():
            tables = list(dict.fromkeys(row["table"] for row in metrics.values()))
            theirs = [metrics.get(metric) for _, metric in SCORES.values()]
            cells = [f"{row['mean']} ± {row['std']}" if row else "" for row in theirs]
            lines.append(["", f"{paper}, Table{'s' * (len(tables) > 1)} {', '.join(tables)}", "", *cells])
    return lines


def iqm_lines(groups: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    lines = []
    for name in order([name for name, _ in groups], METHODS):
        tasks = [rows for (other, _), rows in groups.items() if other == name]
        line = [f"`{name}`", str(len(tasks)), str(sum(map(len, tasks)))]
        for column in SCORES:
            middle, low, high = bootstrap([[row[column] for row in rows] for rows in tasks])
            several = max(map(len, tasks)) > 1  # a single seed says nothing of its spread
            line.append(f"{middle:.1f} [{low:.1f}, {high:.1f}]" if several else f"{middle:.1f}")
        lines.append(line)
    return lines


def pair(row: Row, bases: list[Row]) -> Row | None:
    """Of the runs of `row`'s backbone that of the same seed and checkpoint; of several from others, their mean."""
    same = [x for x in bases if x["seed"] == row["seed"]]
    for x in same:
        if x["offline"] == row["offline"]:  # one checkpoint, one score
            return x
    return same[0] | {k: float(np.mean([x[k] for x in same])) for k in SCORES} if same else None


class Paired(NamedTuple):
    """A method on a task beside its backbone."""

    env: str
    name: str
    base: str
    pairs: list[tuple[Row, Row]]

    def difference(self, column: str) -> tuple[float, float, float]:
        """Mean over the pairs, and its interval."""
        return mean_interval([row[column] - theirs[column] for row, theirs in self.pairs])


def paired(groups: dict[tuple[str, str], list[Row]]) -> list[Paired]:
    """Each method on each task whose backbone has runs of the same seeds there, two at least."""
    bases, found = {backbone: name for name, (kind, backbone) in METHODS.items() if kind == "base"}, []
    for (name, env), rows in groups.items():
        kind, backbone = METHODS.get(name, ("base", ""))
        backbone = ON.get(backbone, "") if kind == "base" else backbone
        base = STANDS_ON.get(name, bases.get(backbone, ""))
        pairs = [(row, theirs) for row in rows if (theirs := pair(row, groups.get((base, env), [])))]
        found += [Paired(env, name, base, pairs)] if len(pairs) > 1 else []
    return found


def paired_lines(groups: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    lines = []
    for x in paired(groups):
        line = [x.env, f"`{x.name}` - `{x.base}`", str(len(x.pairs))]
        for column in SCORES:
            middle, low, high = x.difference(column)
            same = column == "offline" and not any((middle, low, high))  # one checkpoint
            line.append("0" if same else f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]")
        both = ([row["online_mean"] for row in side] for side in zip(*x.pairs, strict=True))
        line.append("{:.2f} [{:.2f}, {:.2f}]".format(*improvement(*both)))
        lines.append(line)
    return lines


def headline(rows: list[Row]) -> str:
    """Per small task: which methods are clearly above their backbone, which below, which neither."""
    own = {k: v for k, v in grouped(rows).items() if section(k[1]) == "other"}
    found, told = [x for x in paired(own) if len(x.pairs) >= ENOUGH], []
    for env in dict.fromkeys(x.env for x in found):
        kinds: dict[str, list[str]] = {
            f"{what} {where}": []
            for what in ("final score", "online average")
            for where in ("above", "below")
        }
        kinds["neither seen to differ"] = []
        for x in (x for x in found if x.env == env):
            clear = False
            for what, column in (("final score", "final"), ("online average", "online_mean")):
                middle, low, high = (round(v, 1) for v in x.difference(column))  # as the table has them
                if low > 0 or high < 0:
                    clear = True
                    kinds[f"{what} {'above' if low > 0 else 'below'}"].append(f"`{x.name}` {middle:+.1f}")
            if not clear:
                kinds["neither seen to differ"].append(f"`{x.name}`")
        parts = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        told.append(f"**`{env}`, beside the backbone:** " + "; ".join(parts) + ".")
    return "\n\n".join(told) or f"No method has {ENOUGH} pairs with its backbone yet."


def cost_lines(groups: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    lines = []
    for (name, env), rows in groups.items():
        costs = [cell([row[k] for row in rows], ".3g", spread=False) for k in COSTS]
        devices = ", ".join(sorted({row["device"] for row in rows}))
        lines.append([env, f"`{name}`", str(len(rows)), devices, *costs])
    return lines


def report(rows: list[Row]) -> str:
    """The Markdown that goes to the screen, to report.md and between README's markers."""
    groups, parts = grouped(rows), []
    for kind, title in SECTIONS.items():
        if not (own := {k: v for k, v in groups.items() if section(k[1]) == kind}):
            continue
        heads, lines = [head for head, _ in SCORES.values()], score_lines(own)
        parts += [f"### {title}\n", table(["task", "method", "runs", *heads], lines)]
        if any(not line[0] for line in lines):
            parts.append("A paper's numbers are as printed; protocols and sources: `common/published.csv`.\n")
        if lines := paired_lines(own):
            told = "Differences to the backbone, paired by seed: mean [95% interval over seeds]; last, the chance that"
            parts.append(f"{told} a run's online average is above one of the backbone's.\n")
            parts.append(table(["task", "difference", "pairs", *heads, "P(improvement)"], lines))
        if kind != "other":
            parts.append("Over tasks: interquartile mean [95% interval], comparable on the same tasks.\n")
            parts.append(table(["method", "tasks", "runs", *heads], iqm_lines(own)))
        if flags := {k: v[0]["flags"] for k, v in own.items() if v[0]["flags"]}:
            parts.append("Settings that are not the file's own for the task:\n")
            parts.append("".join(f"- `{name}` on {env}: {told}\n" for (name, env), told in flags.items()))
    if groups:
        head = ["task", "method", "runs", "device", *COSTS.values()]
        parts += ["### Cost\n", table(head, cost_lines(groups))]
    if left := [row for row in rows if row["problem"]]:
        names = [f"{x['file']}/{x['env']}/{'seed' * x['seed'].isdigit()}{x['seed']}" for x in left]
        parts.append(f"### Left out: {len(left)} of {len(rows)} runs\n")
        parts.append("".join(f"- {name}: {row['problem']}\n" for name, row in zip(names, left, strict=True)))
    return "\n".join(parts)


def write_rows(rows: list[Row]) -> str:
    """results.csv of `rows`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: Path, key: Callable[[Row], str] = method) -> list[Row]:
    """Rows of a results.csv, its numbers as numbers, `key` as in `grouped`; UsageError if it is not one."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        for row in rows:
            may_lack = COSTS if row["problem"] == "" else COLUMNS
            for k in (*SCORES, *COSTS):
                row[k] = None if row[k] == "" and k in may_lack else float(row[k])
            assert set(row) == set(COLUMNS) and None not in map(row.get, WORDS), "other columns"
    except (OSError, ValueError, KeyError, TypeError, csv.Error, AssertionError) as e:
        reason = f"{type(e).__name__}: {e}"[:100]
        raise run.UsageError("--csv", path, f"a results.csv that this program wrote ({reason})") from e
    settle(rows, {}, key, once=("seed", "offline"))
    return rows


def keep(rows: list[Row], path: Path) -> None:
    """Put `rows` into the results.csv at `path`, each in place of that of the same method, task and seed.

    A row from another checkpoint (another machine rounds differently) with the same settings stays beside it: runs
    that started there have it as their pair.
    """
    old = read_rows(path, by_flags) if path.exists() else []

    def replaced(x: Row, y: Row) -> bool:
        same = all(x[k] == y[k] for k in ("file", "flags", "env", "seed"))
        return same and (x["settings"] != y["settings"] or x["offline"] == y["offline"])

    kept = [x for x in old if not any(replaced(x, y) for y in rows)] + rows
    tasks = {name: i for i, name in enumerate(data.TASKS)}
    kept.sort(key=lambda x: (tasks.get(x["env"], len(tasks)), by_flags(x), int(x["seed"])))
    run.write_atomically(write_rows(kept).encode(), path)


def around(readme: Path, markers: tuple[str, str]) -> tuple[str, str]:
    """Text up to and with the first of `markers`, text from the second on; UsageError if they are not there once."""
    begin, end = markers
    try:
        before = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise run.UsageError("--readme", readme, f"a text file ({type(e).__name__})") from e
    if [before.count(m) for m in markers] != [1, 1] or before.index(begin) > before.index(end):
        raise run.UsageError("--readme", readme, f"a file with one {begin} and, after it, one {end}")
    return before[: before.index(begin) + len(begin)], before[before.index(end) :]


def insert(text: str, readme: Path, markers: tuple[str, str] = MARKERS) -> None:
    """Put `text` between the markers of `readme`; UsageError if they are not there, once and in this order."""
    head, tail = around(readme, markers)
    run.write_atomically(f"{head}\n\n{text}\n{tail}".encode(), readme)


# ---- figures ----


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def look(name: str) -> dict[str, Any]:
    """Colour by method, backbones thick and grey; dashed on IQL."""
    kind, backbone = METHODS.get(name, (name, "IQL" if name.startswith("iql") else "Cal-QL"))
    known = ("base", "DARE", "StratDiff", "EDIS", "AD2S", "DUAL", "CFDG")
    color = f"C{order([k for k, _ in METHODS.values()] + [kind], known).index(kind)}"
    style = "--" if backbone == "IQL" else "-"
    color = {"CQL": "black"}.get(backbone, "0.5" if kind == "base" else color)
    return {"color": color, "linestyle": style, "linewidth": 2.5 if kind == "base" else 1.3, "label": name}


def line_of(runs: list[Found], phase: str, column: str) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Steps that every run has, mean and standard deviation of `column` there (0 for one run)."""
    logs = [{x["step"]: x[column] for x in r.log if x["phase"] == phase and column in x} for r in runs]
    if phase == "online" and column == "eval/score":  # begins where offline ended
        logs = [{0: r.row["offline"], **log} if log else {} for r, log in zip(runs, logs, strict=True)]
    steps = sorted(set(logs[0]).intersection(*logs[1:]))
    values = np.array([[log[step] for step in steps] for log in logs])
    return steps, values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))


def short(steps: float) -> str:
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps >= 1e3 else f"{steps:g}"


def curves(
    panels_of: dict[str, dict[str, list[Found]]], column: str, phases: tuple[str, ...], columns: int = 4
) -> Any:
    """A panel per title, a line per method with a band of one standard deviation; each phase takes the same width."""
    columns = min(len(panels_of), columns)
    height = -(-len(panels_of) // columns)
    figure, legend = new_figure(max(3.4 * columns, 6), 2.8 * height + 0.8), {}
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for panel, (title, own) in zip(panels, panels_of.items(), strict=False):
        logs = [x for runs in own.values() for r in runs for x in r.log if "eval/score" in x or column in x]
        ends = [max((x["step"] for x in logs if x["phase"] == p), default=1) or 1 for p in phases]
        for name, runs in own.items():
            for i, phase in enumerate(phases):
                steps, mean, spread = line_of(runs, phase, column)
                x, marker = i + np.array(steps) / ends[i], "." if len(steps) < 4 else None
                (legend[name],) = panel.plot(x, mean, marker=marker, **look(name))
                color = look(name)["color"]
                panel.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        for i in range(1, len(phases)):
            panel.axvline(i, color="gray", linewidth=0.8)
        ticks = [f"{short(end)} | 0" if i + 1 < len(ends) else short(end) for i, end in enumerate(ends)]
        panel.set_xticks(range(len(ends) + 1), ["0", *ticks])
        panel.set_xlabel(" | ".join(f"{p} steps" for p in phases), fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    for panel in panels[len(panels_of) :]:
        panel.remove()
    names = order(legend, METHODS)
    figure.legend([legend[k] for k in names], names, loc="outside lower center", ncols=4, fontsize=8)
    figure.supylabel({"eval/score": "score"}.get(column, "pairs exchanged per batch"), fontsize=9)
    return figure


def projection(rows: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, str]:
    """t-SNE of `rows` (N, D) in two dimensions where scikit-learn is installed, else main axes of the rows `real`."""
    try:
        from sklearn.manifold import TSNE

        return TSNE(random_state=0, init="pca").fit_transform(rows), "t-SNE"
    except ImportError:
        axes = np.linalg.svd(real - real.mean(0), full_matrices=False)[2][:2]
        return (rows - real.mean(0)) @ axes.T, "PCA"


@cache
def moments(name: str, dataset: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Of the observations of a run's dataset, which is never fetched for a figure: FileNotFoundError."""
    if not (path := dataset or data.get_task(name).path).is_file():
        raise FileNotFoundError(path)
    return data.load(name, dataset).moments()


def dynamics_distance(settings: dict[str, Any], rows: np.ndarray, spread: np.ndarray) -> np.ndarray | None:
    """Per row, mean square over features of (s' - the simulator's s') / `spread` [AD2S Fig. 3]; None if unknown."""
    name, dataset = settings["env"], settings["dataset"]
    try:
        env, mean, std = data.make_env(data.get_task(name)), 0.0, 1.0
        if settings.get("normalize_obs"):
            mean, std = moments(name, Path(dataset) if dataset else None)
    except (OSError, run.UsageError):
        return None
    o, a = env.observation_space.shape[0], env.action_space.shape[0]
    truth = judge.simulate(env, rows[:, :o] * std + mean, rows[:, o : o + a])
    if truth is None:
        return None
    return (((rows[:, o + a + 1 :] - (truth[0] - mean) / std) / spread[o + a + 1 :]) ** 2).mean(1)


def synthetic(runs: dict[str, Found]) -> Any:
    """The last generated rows of each method: where they lie; L2 distance to the mean own row; dynamics distance.

    In units of the real rows' standard deviation. Raises ValueError naming a file that is damaged.
    """
    figure = new_figure(max(8, 2.9 * len(runs)), 6.5)
    top, bottom = figure.subfigures(2, 1)
    distances: tuple[dict, dict] = {}, {}
    for panel, (name, found) in zip(top.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        path = max(found.folder.glob("synthetic-*.npz"), key=lambda p: (len(p.stem), p.stem))
        try:
            with np.load(path) as file:  # rows are in order of time; the last column is termination
                parts = {k: np.asarray(file[k][:, :-1], dtype=np.float64) for k in file.files}
            parts = {k: x[:: max(len(x) // 500, 1)] for k, x in parts.items()}
            real = np.concatenate([v for k, v in parts.items() if k != "synthetic"])
            mean, spread = real.mean(0), np.where(real.std(0) > 1e-3, real.std(0), 1.0)
            scaled = {k: (x - mean) / spread for k, x in parts.items()}
            own = scaled.get("online", scaled["offline"])
            flat, kind = projection(np.concatenate(list(scaled.values())), (real - mean) / spread)
            error = dynamics_distance(found.settings, parts["synthetic"], spread)
        except Exception as e:  # whatever a damaged archive makes numpy raise
            raise ValueError(f"{path.name} of {name}: {type(e).__name__}") from e
        stops = np.cumsum([len(x) for x in scaled.values()])[:-1]
        for k, points in zip(scaled, np.split(flat, stops), strict=True):
            color, above = {"synthetic": ("C1", 2), "online": ("C0", 2)}.get(k, ("0.65", 1))
            panel.scatter(*points.T, s=4, color=color, label=k, alpha=0.5, linewidths=0, zorder=above)
        panel.set_title(f"{name}, seed {found.row['seed']}: {kind}", fontsize=9)
        panel.set(xticks=[], yticks=[])
        distances[0][name] = np.linalg.norm(scaled["synthetic"] - own.mean(0), axis=1)
        distances[0][f"own rows of {name}"] = np.linalg.norm(own - own.mean(0), axis=1)
        if error is not None:
            distances[1][name] = np.log10(np.maximum(error, 1e-12))
    handles = panel.get_legend_handles_labels()
    top.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, markerscale=3)
    labels = "L2 distance to the mean own row", "log10 of the mean squared error of s' against the simulator"
    for panel, values, label in zip(bottom.subplots(1, 2), distances, labels, strict=True):
        bins = np.histogram_bin_edges(np.concatenate([[0], *values.values()]), 35) if values else []
        for name in [k for k in values if k in runs]:
            heights = np.histogram(values[name], bins, density=True)[0]
            panel.plot((bins[1:] + bins[:-1]) / 2, heights, **look(name))
        if rest := [v for k, v in values.items() if k not in runs]:
            style = {"density": True, "alpha": 0.3, "color": "0.5", "label": "own rows of all"}
            panel.hist(np.concatenate(rest), bins, **style)
        if not values:
            reason = "unknown: no simulator state, or the dataset is not here"
            panel.text(0.5, 0.5, reason, ha="center", va="center")
        panel.set_xlabel(label, fontsize=9)
        panel.set_ylim(bottom=0)
        panel.set_yticks([])
        panel.tick_params(labelsize=8)
    bottom.axes[0].legend(fontsize=8)
    figure.suptitle(found.row["env"], fontsize=10)
    return figure


def by_group(found: list[Found]) -> dict[tuple[str, str], list[Found]]:
    """As `grouped`, of runs."""
    by_folder = {id(r.row): r for r in found}
    return {k: [by_folder[id(row)] for row in rows] for k, rows in grouped(r.row for r in found).items()}


def panels_by(groups: dict[tuple[str, str], list[Found]], title: Callable[[str, str], str]) -> dict:
    """title(method, env) -> method -> its runs, in the order of `groups`."""
    panels: dict = {}
    for (name, env), runs in groups.items():
        panels.setdefault(title(name, env), {})[name] = runs
    return panels


def study(found: list[Found]) -> Any:
    """Online learning curves of tasks that are no paper's: a panel per task and backbone, the backbone in grey."""
    groups = {k: v for k, v in by_group(found).items() if section(k[1]) == "other"}

    def title(name: str, env: str) -> str:
        on = METHODS.get(name, ("", name))[1]
        return f"{env}, on {STANDS_ON[name] or name if name in STANDS_ON else on}"

    of = panels_by(groups, title)
    return curves(of, "eval/score", ("online",), columns=2)


def figures(found: list[Found]) -> Iterable[tuple[str, Callable[[], Any]]]:
    """File name and maker of every figure that the runs have something for."""
    groups = by_group(found)
    for kind in SECTIONS:
        own = {k: v for k, v in groups.items() if section(k[1]) == kind}
        if panels := panels_by(own, lambda _, env: env):
            yield f"curves-{kind}.png", lambda x=panels: curves(x, "eval/score", PHASES)
        own = {k: v for k, v in own.items() if any("split/exchanged" in x for x in v[0].log)}
        if panels := panels_by(own, lambda _, env: env):
            yield f"exchange-{kind}.png", lambda x=panels: curves(x, "split/exchanged", ("online",))
    for env in dict.fromkeys(env for _, env in groups):
        runs = {name: v[0] for (name, other), v in groups.items() if other == env}
        if runs := {k: v for k, v in runs.items() if any(v.folder.glob("synthetic-*.npz"))}:
            yield f"synthetic-{env}.png", lambda runs=runs: synthetic(runs)


def drawn(rows: list[Row]) -> list[Found]:
    """Kept runs, of which no more is known than their online scores; without those that have none."""
    found = []
    for row in rows:
        points = [text.split(":") for text in row["curve"].split()]
        log = [{"phase": "online", "step": float(a), "eval/score": float(b)} for a, b in points]
        found += [Found(row, Path(), {}, log)] if log and not row["problem"] else []
    return found


def forest(rows: list[Row]) -> Any:
    """Of tasks that are no paper's: each method's difference to its backbone, final score and online average."""
    own = {k: v for k, v in grouped(rows).items() if section(k[1]) == "other"}
    found = paired(own)
    envs = list(dict.fromkeys(x.env for x in found))
    names = order((x.name for x in found), METHODS)[::-1]
    figure = new_figure(5 * max(len(envs), 1), 1.2 + 0.27 * len(names))
    panels = figure.subplots(1, max(len(envs), 1), sharey=True, squeeze=False)[0]
    for panel, env in zip(panels, envs, strict=False):
        for x in (x for x in found if x.env == env):
            for lift, column in ((0.14, "final"), (-0.14, "online_mean")):
                middle, low, high = x.difference(column)
                color = "C0" if low > 0 else "C3" if high < 0 else "0.6"
                y, fill = names.index(x.name) + lift, "full" if column == "final" else "none"
                panel.plot([low, high], [y, y], color=color, linewidth=1.2)
                panel.plot(middle, y, "o", color=color, markersize=4, fillstyle=fill)
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_title(env, fontsize=9)
        panel.set_xlabel("points above the backbone", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.25)
    on = {x.name: x.base for x in found}
    panels[0].set_yticks(range(len(names)), [f"{name} on {on[name]}" for name in names])
    return figure


def write_svg(figure: Any, path: Path) -> None:
    """The same figure makes the same file."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_atomically(content.getvalue(), path)


# ---- program ----


@dataclass(frozen=True)
class Args:
    """Tables and figures from run directories."""

    runs: tyro.conf.Positional[Path] = Path("runs")  # folder with run directories at any depth
    out: Path | None = None  # folder for report.md, results.csv and figures; default: RUNS/report
    readme: Path | None = None  # put the tables between this file's markers
    figure: Path | None = None  # put the learning curves of the embedded tasks into this SVG file
    forest: Path | None = None  # and their differences to the backbones into this one
    csv: Path | None = None  # make these from this results.csv instead of run directories; no other figures
    keep: Path | None = None  # put the runs that count into this results.csv, in place of older ones; stop
    watch: float | None = None  # show unfinished runs, renewed after so many seconds, and nothing else


def main(args: Args) -> None:
    found: list[Found] = []
    if args.watch is not None:
        if not args.watch > 0 or args.csv:
            raise run.UsageError("--watch", args.watch, "seconds above 0, of a folder with run directories")
        watch.watch(args.runs, args.watch)
        return
    if args.csv:
        rows = read_rows(args.csv)
        found = drawn(rows)
    else:
        rows, found = find(args.runs)
    if not rows:
        allowed = "a folder with run directories, or their results.csv"
        raise run.UsageError("runs", args.csv or args.runs, allowed)
    if args.keep:
        keep([x for x in rows if not x["problem"]], args.keep)
        return
    if args.figure:
        write_svg(study(found), args.figure)
    if args.forest:
        write_svg(forest(rows), args.forest)
    text = report(rows)
    out = args.out or (None if args.csv else args.runs / "report")
    if args.readme:
        insert(text, args.readme)
        if HEADLINE[0] in args.readme.read_text(encoding="utf-8"):
            insert(headline(rows), args.readme, HEADLINE)
    print(text, end="")
    if going := "" if args.csv else watch.table(args.runs):
        print(f"\nUnfinished\n\n{going}", end="")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    run.write_atomically(text.encode(), out / "report.md")
    run.write_atomically(write_rows(rows).encode(), out / "results.csv")
    for name, make in figures([] if args.csv else found):
        try:
            content = io.BytesIO()
            make().savefig(content, metadata={"Software": None})
            run.write_atomically(content.getvalue(), out / name)
        except ValueError as e:
            print(f"warning: no {name}: {e}", file=sys.stderr)


if __name__ == "__main__":
    run.main(main, Args)
