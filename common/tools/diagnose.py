"""What the papers say of the inside of their methods, and what runs say: a table with verdicts.

    python -m common.tools.diagnose runs/                                         from run directories
    python -m common.tools.diagnose runs/ --keep common/diagnostics.csv           into the kept ones
    python -m common.tools.diagnose --csv common/diagnostics.csv --readme README.md     README's table, from those

A claim is that one logged number is above another (or 0), of one method or of two with the same seeds (where two
machines shared the study, not always from one checkpoint). Over the seeds of a task: mean difference [Student's 95%
interval]; runs agree with the paper if the interval is above 0, disagree if it is below, else they cannot tell, and say
nothing with fewer than five seeds. What is logged: files' docstrings and common/judge.py; of each run its last value,
of split/* and ref/*, which are a batch's, the mean.
"""

import csv
import io
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from common import data, run
from common.tools import report

MARKERS = "<!-- diagnostics -->", "<!-- end diagnostics -->"
COLUMNS = "file", "env", "seed", "commit", "metric", "value"


class Claim(NamedTuple):
    """`more` is above `less`: (file, metric), or 0."""

    source: str
    says: str  # with the paper's own figure where it has one
    more: tuple[str, str]
    less: tuple[str, str] | None = None


CLAIMS: list[Claim] = []  # filled below


def claim(source: str, says: str, more: str, less: str = "") -> None:
    """Of the `file metric` pairs `more` and `less`."""
    CLAIMS.append(Claim(source, says, tuple(more.split()), tuple(less.split()) or None))


# fmt: off
CFDG = "CFDG Table 2, `iql_cfdg`"
claim(CFDG, "states: generated rows are nearer to own rows than the dataset is, JS 0.50 < 0.69",
      "iql_cfdg syn/dataset_js_states", "iql_cfdg syn/js_states")
claim(CFDG, "actions: the same, 0.27 < 0.32", "iql_cfdg syn/dataset_js_actions", "iql_cfdg syn/js_actions")
claim(CFDG, "transitions: the same, 0.61 < 0.69", "iql_cfdg syn/dataset_js_rows", "iql_cfdg syn/js_rows")
claim(CFDG, "states: nearer than EDIS's, 0.50 < 0.56", "iql_edis syn/js_states", "iql_cfdg syn/js_states")
claim(CFDG, "actions: the same, 0.27 < 0.31", "iql_edis syn/js_actions", "iql_cfdg syn/js_actions")
claim(CFDG, "transitions: the same, 0.61 < 0.64", "iql_edis syn/js_rows", "iql_cfdg syn/js_rows")
for file in ("edis", "iql_edis"):
    EDIS = f"EDIS, `{file}`"
    claim(EDIS, "guidance brings states nearer to own rows' (JS)",
          f"{file} energy/unguided_js_states", f"{file} energy/guided_js_states")
    claim(EDIS, "guidance brings actions nearer to the policy's (rms)",
          f"{file} energy/unguided_policy_gap", f"{file} energy/guided_policy_gap")
    claim(EDIS, "guidance brings s' nearer to the simulator's (rms)",
          f"{file} energy/unguided_sim_error", f"{file} energy/guided_sim_error")
AD2S = "AD2S Fig. {}, `calql_ad2s`"
claim(AD2S.format(3), "generated rows lie farther from the mean own row than EDIS's (L2)",
      "calql_ad2s syn/online_l2", "edis syn/online_l2")
claim(AD2S.format(3), "and have the larger dynamic distance (s' from the simulator's, rms)",
      "calql_ad2s syn/sim_error", "edis syn/sim_error")
claim(AD2S.format(4), "generated rewards are higher than own rows' (standard deviations)", "calql_ad2s syn/reward_gain")
claim(AD2S.format(4), "and higher than those that EDIS generates", "calql_ad2s syn/reward_gain", "edis syn/reward_gain")
claim("AD2S Eq. 5, `calql_ad2s`", "u weighs nearness beside reward (ours: rank correlation to reward below 0.9)",
      "calql_ad2s align/u_beyond_reward")
for name, file in [("DARE", "iql_dare"), ("DARE", "calql_dare"),
                   ("StratDiff", "iql_stratdiff"), ("StratDiff", "calql_stratdiff")]:
    source = f"{name}, `{file}`"
    claim(source, "guided references have a higher Q than the dataset's actions", f"{file} ref/q_gain_off")
    claim(source, "own rows are less aligned with references than the dataset's (mean d; the idea, no sentence)",
          f"{file} split/gap")
    claim(source, "exchanges part the halves more than as many random ones (mean d; so made)",
          f"{file} split/gap_after", f"{file} split/gap_random")
for file in ("iql_dare", "calql_dare"):
    claim(f"DARE Fig. 1c, `{file}`", "scores of the halves overlap (ours: means within one standard deviation)",
          f"{file} split/overlap")
    claim(f"DARE Eq. 9, `{file}`", "fitted Gaussians cross between their means (ours: in half of the batches)",
          f"{file} split/root_above_half")
for file in ("dual", "calql_dual", "so2_dual"):
    claim(f"DUAL §3.1, `{file}`", "one denoising step plans as 32 do (ours: error below a tenth of the variance)",
          f"{file} distill/close")
    claim(f"DUAL §3.3, `{file}`", "doubt of W is larger where P̂ errs more (rank correlation; the idea, no sentence)",
          f"{file} uq/error_rank")
# fmt: on

Values = dict[tuple[str, str, str, str], float]  # (file, env, seed, metric) -> value


# ---- reading ----


def logged(folder: Path) -> list[dict[str, float]]:
    """The finite numbers of every line of log.csv."""
    with open(folder / "log.csv", newline="") as f:
        texts = [{k: v for k, v in line.items() if k != "phase" and v} for line in csv.DictReader(f)]
    return [{k: x for k, v in line.items() if math.isfinite(x := float(v))} for line in texts]


def derived(found: report.Found) -> dict[str, float]:
    """What claims name, of a run: logged values and those made of them."""
    args, series = found.settings, defaultdict(list)
    for line in logged(found.folder):
        if "split/gap" in line:
            n_off = round(args["offline_frac"] * args["batch_size"])
            left = 1 - line["split/exchanged"] * (1 / n_off + 1 / (args["batch_size"] - n_off))
            line["split/gap_random"] = line["split/gap"] * left
        for k, v in line.items():
            series[k].append(v)
    x = {
        k: float(np.mean(v)) if k.startswith(("split/", "ref/", "uq/")) else v[-1] for k, v in series.items()
    }
    if "split/off_std" in x and "split/gap" in x:
        pooled = math.sqrt((x["split/off_std"] ** 2 + x["split/on_std"] ** 2) / 2)
        x["split/overlap"] = 1 - abs(x["split/gap"]) / pooled
    if "split/root_valid" in x:
        x["split/root_above_half"] = x["split/root_valid"] - 0.5
    if "align/u_reward_rank" in x:
        x["align/u_beyond_reward"] = 0.9 - x["align/u_reward_rank"]
    if "distill/error_1" in x:
        x["distill/close"] = 0.1 - x["distill/error_1"]
    if files := sorted(found.folder.glob("synthetic-*.npz"), key=lambda p: (len(p.stem), p.stem)):
        task = data.get_task(args["env"])
        with np.load(files[-1]) as file:
            column = task.obs_dim + task.act_dim  # (s, a, r, s', terminated)
            own, generated = (file[k][:, column] for k in ("online", "synthetic"))
            real = np.concatenate([own, file["offline"][:, column]])
        if spread := float(real.std()):  # none where no row is rewarded
            x["syn/reward_gain"] = float(generated.mean() - own.mean()) / spread
    used = {metric for c in CLAIMS for side in (c.more, c.less) if side for metric in side[1:]}
    return {k: v for k, v in x.items() if k in used}


def collect(root: Path) -> list[dict[str, str]]:
    """Rows of diagnostics.csv: every metric that a claim names, of every run below `root` that counts."""
    rows = []
    for found in report.find(root)[1]:
        if found.row["flags"]:  # not the file's own settings
            continue
        head = {k: found.row[k] for k in ("file", "env", "seed", "commit")}
        rows += [head | {"metric": k, "value": f"{v:.6g}"} for k, v in sorted(derived(found).items())]
    return rows


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a diagnostics.csv; UsageError if it is not one."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
        for row in rows:
            if set(row) != set(COLUMNS) or None in row.values() or not math.isfinite(float(row["value"])):
                raise ValueError("other columns, or no number")
    except (OSError, ValueError, csv.Error) as e:
        reason = f"{type(e).__name__}: {e}"[:100]
        raise run.UsageError("--csv", path, f"a diagnostics.csv that this program wrote ({reason})") from e
    return rows


def write(rows: list[dict[str, str]], path: Path) -> None:
    """Put `rows` into the diagnostics.csv at `path`, in place of those of the same run."""
    runs = {(x["file"], x["env"], x["seed"]) for x in rows}
    kept = read(path) if path.exists() else []
    kept = [x for x in kept if (x["file"], x["env"], x["seed"]) not in runs] + rows
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        sorted(
            kept,
            key=lambda x: (x["env"] != "reacher-mini-v0", x["env"], x["file"], int(x["seed"]), x["metric"]),
        )
    )
    run.write_atomically(text.getvalue().encode(), path)


# ---- the table ----


def differences(values: Values, told: Claim, env: str) -> list[float]:
    """more - less, of every seed that has both."""
    out = []
    for (file, other, seed, metric), value in values.items():
        if (file, metric) == told.more and other == env:
            less = 0.0 if told.less is None else values.get((told.less[0], env, seed, told.less[1]))
            out += [] if less is None else [value - less]
    return out


def verdict(found: list[float]) -> str:
    """Mean difference [interval], seeds, and what it says of the claim if they are enough; two seeds at least."""
    if len(found) < 2:
        return report.MISSING
    middle, low, high = report.mean_interval(found)
    word = "agree" if low > 0 else "**disagree**" if high < 0 else "cannot tell"
    word = word if len(found) >= report.ENOUGH else "too few"
    return f"{middle:+.3g} [{low:+.3g}, {high:+.3g}], {len(found)}: {word}"


def show(rows: list[dict[str, str]]) -> str:
    """The Markdown table of all claims that have two runs at least on some task."""
    values = {(x["file"], x["env"], x["seed"], x["metric"]): float(x["value"]) for x in rows}
    envs = sorted({env for _, env, *_ in values}, key=lambda env: (env != "reacher-mini-v0", env))
    lines = []
    for told in CLAIMS:
        cells = [verdict(differences(values, told, env)) for env in envs]
        if set(cells) != {report.MISSING}:
            lines.append([told.source, told.says, *cells])
    return report.table(["paper, file", "it says", *(f"{env}: difference, seeds" for env in envs)], lines)


@dataclass(frozen=True)
class Args:
    """Claims of the papers beside what runs say."""

    runs: tyro.conf.Positional[Path] = Path("runs")  # folder with run directories at any depth
    csv: Path | None = None  # make the table from this diagnostics.csv instead
    keep: Path | None = (
        None  # put the runs' values into this diagnostics.csv, in place of older ones, and stop
    )
    readme: Path | None = None  # put the table between this file's markers


def main(args: Args) -> None:
    rows = read(args.csv) if args.csv else collect(args.runs)
    if not rows:
        allowed = "a folder with finished runs that logged something a paper speaks of"
        raise run.UsageError("runs", args.csv or args.runs, allowed)
    if args.keep:
        write(rows, args.keep)
        return
    text = show(rows)
    if args.readme:
        report.insert(text, args.readme, MARKERS)
    print(text, end="")


if __name__ == "__main__":
    run.main(main, Args)
