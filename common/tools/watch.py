"""Runs that are going on: phase, pace, time left, last score; `report RUNS --watch 30` shows them."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

from filelock import Timeout

from common import run

HEADING = "run", "is", "phase", "step", "steps/s", "score", "run ends in", "told"


def unfinished(root: Path) -> list[Path]:
    """Run directories below `root` that have begun and are not finished."""
    return [p.parent for p in sorted(root.glob("**/args.json")) if not (p.parent / "final.json").exists()]


def running(folder: Path) -> bool:
    """Does a process train there?"""
    if not (folder / ".lock").exists():
        return False
    try:
        with run.lock_of(folder).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's folder
        return False


def line(folder: Path) -> tuple[str, ...]:
    """A row of the table; what the run did not tell yet, or told badly, is a question mark."""
    path = folder / "progress.json"
    try:
        told, age = json.loads(path.read_text()), max(time.time() - path.stat().st_mtime, 0)
        per_s, left, score = (told[k] for k in ("per_s", "left_s", "score"))
        numbers = (
            f"{told['step']:,} of {told['steps']:,}",
            "?" if per_s is None else f"{per_s:.3g}",
            "?" if score is None else f"{score:.1f}",
            "?" if left is None else str(timedelta(seconds=round(left))),
            f"{timedelta(seconds=round(age))} ago",
        )
        cells = (str(told["phase"]), *numbers)
    except (OSError, ValueError, KeyError, TypeError):
        cells = ("begun", *"?????")
    name = "/".join(folder.absolute().parts[-3:])
    return name, "running" if running(folder) else "stopped", *cells


def table(root: Path) -> str:
    """Unfinished runs below `root` as text, in aligned columns; empty without any."""
    rows = [line(folder) for folder in unfinished(root)]
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(HEADING, *rows, strict=True)]
    texts = (
        "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in (HEADING, *rows)
    )
    return "\n".join(texts) + "\n"


def watch(root: Path, seconds: float) -> None:
    """The table, renewed until no run is left or the user stops it."""
    while text := table(root):
        clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
        print(f"{clear}{time.strftime('%H:%M:%S')}, every {seconds:g} s\n\n{text}", flush=True)
        time.sleep(seconds)
    print(f"{root}: no unfinished run")
