"""The papers' ablations on the one-minute task: what each part of a method is worth, with intervals.

    bash run_all.sh --ablations                                          runs them; results to common/ablations.csv
    python -m common.tools.ablations --list                              file, tab, flags: what that runs
    python -m common.tools.ablations --readme README.md                  README's table, from the kept results

Whole method minus ablated one, paired by seed, from one checkpoint: mean [Student's 95% interval]. The papers say that
every part helps: with five pairs or more, runs agree if the interval of the final score or of the online average is
above 0, disagree if one is below it, else they cannot tell. The controls are ours: EDIS and AD2S also take the dataset
from the learner that goes online; a backbone without it (one row of a batch remains) tells what that does, and
12,000 steps of training (a preset's take a minute) what a better model does.
"""

from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from common import run
from common.tools import report

MARKERS = "<!-- ablations -->", "<!-- end ablations -->"
KEPT, WHOLE = (report.PUBLISHED.with_name(f"{name}.csv") for name in ("ablations", "results"))
COLUMNS = "final", "online_mean"


class Ablation(NamedTuple):
    file: str
    flags: str
    source: str
    without: str  # what the paper calls it, or what is left out


# fmt: off
ABLATIONS = [
    Ablation("iql", "--offline-frac 0.004", "control", "dataset rows online"),
    Ablation("calql", "--offline-frac 0.004", "control", "dataset rows online"),
    Ablation("edis", "--diffusion-steps 12000", "control", "the brief training of its model"),
    Ablation("calql_ad2s", "--diffusion-steps 12000", "control", "the brief training of its model"),
    Ablation("iql_cfdg", "--guidance-w 0.0", "CFDG Table 3", "guidance, labels kept"),
    Ablation("iql_cfdg", "--no-labels", "CFDG Table 3", "guidance"),
    Ablation("iql_cfdg", "--online-label-frac 1.0", "CFDG Table 3", "offline augmentation"),
    Ablation("calql_ad2s", "--p-dr 1.0", "AD2S Table 2", "distribution alignment"),
    Ablation("calql_ad2s", "--guidance-eta -1.0", "AD2S Table 2", "conditional guidance"),
    Ablation("calql_ad2s", "--noising-scale 1.0", "AD2S Table 2", "partial noising"),
    Ablation("calql_ad2s", "--advantage q", "AD2S Table 3", "the advantage: Q"),
    Ablation("edis", "--state-energy 0.0", "EDIS", "energy of states"),
    Ablation("edis", "--policy-energy 0.0", "EDIS", "energy of the policy"),
    Ablation("edis", "--dynamics-energy 0.0", "EDIS", "energy of the dynamics"),
    Ablation("iql_dare", "--guidance-scale 0.0", "DARE Fig. 4, 14", "the energy function"),
    Ablation("iql_dare", "--exchange-cap 0", "DARE Fig. 4, 14", "exchange"),
    Ablation("iql_dare", "--threshold sort", "DARE Fig. 3 (Cal-QL)", "the Gaussians: direct exchange"),
    Ablation("iql_stratdiff", "--guidance-scale 0.0", "StratDiff Fig. 4", "the energy function"),
    Ablation("iql_stratdiff", "--exchange-cap 0", "StratDiff Table 8", "stratification"),
    Ablation("iql_stratdiff", "--online-value advantage", "StratDiff Table 6", "the expectile loss"),
    Ablation("dual", "--uq none", "DUAL Table 4", "epistemic uncertainty"),
    Ablation("dual", "--shift-weight 0.0", "DUAL Table 4", "the shift term"),
    Ablation("calql_dual", "--uq none", "DUAL Table 4", "epistemic uncertainty"),
    Ablation("calql_dual", "--shift-weight 0.0", "DUAL Table 4", "the shift term"),
    Ablation("dual", "--uq latent", "DUAL Fig. 3c", "the posterior: draws of the latent"),
    Ablation("dual", "--laplace-weights elbo", "DUAL Fig. 3c", "the critic's weights: LA with ELBO"),
]
# fmt: on


def kept_flags(flags: str) -> str:
    """As results.csv has them: `--p-dr 1.0` is p_dr=1.0, `--no-labels` labels=False."""
    words = flags.split()
    name = words[0].removeprefix("--").replace("-", "_")
    return f"{name}={words[1]}" if len(words) == 2 else f"{name.removeprefix('no_')}=False"


def show(whole: list[report.Row], ablated: list[report.Row]) -> str:
    """The Markdown table of all ablations that have two pairs at least."""
    checkpoint = itemgetter("file", "env", "seed", "offline")
    counted = [x for x in (*whole, *ablated) if not x["problem"]]
    full = {checkpoint(x): x for x in counted if not x["flags"]}
    pairs = defaultdict(list)
    for row in counted:
        if row["flags"] and (base := full.get(checkpoint(row))):
            pairs[row["file"], row["flags"], row["env"]].append((base, row))
    lines = []
    for part in ABLATIONS:
        for env in sorted({e for f, flags, e in pairs if (f, flags) == (part.file, kept_flags(part.flags))}):
            found = pairs[part.file, kept_flags(part.flags), env]
            if len(found) < 2:
                continue
            told = [report.mean_interval([a[k] - b[k] for a, b in found]) for k in COLUMNS]
            above, below = any(low > 0 for _, low, _ in told), any(high < 0 for *_, high in told)
            word = (
                "agree" if above and not below else "**disagree**" if below and not above else "cannot tell"
            )
            word = word if len(found) >= report.ENOUGH else "too few pairs"
            cells = [f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]" for middle, low, high in told]
            head = [part.source, f"`{part.file}`", part.without, f"`{part.flags}`", env, str(len(found))]
            lines.append([*head, *cells, word])
    if not lines:
        return "No ablation has two pairs yet.\n"
    heads = ["paper", "file", "without", "flag", "task", "pairs", "final", "online average", "it helps"]
    return report.table(heads, lines)


@dataclass(frozen=True)
class Args:
    """Whole methods beside those that lack a part."""

    list: bool = False  # print the ablations, file and flags, and stop
    csv: Path = KEPT  # results of the ablated runs, and of whole ones that started with them
    whole: Path = WHOLE  # results of the whole methods
    readme: Path | None = None  # put the table between this file's markers


def main(args: Args) -> None:
    if args.list:
        print("\n".join(f"{x.file}\t{x.flags}" for x in ABLATIONS))
        return
    text = show(report.read_rows(args.whole), report.read_rows(args.csv, report.by_flags))
    if args.readme:
        report.insert(text, args.readme, MARKERS)
    print(text, end="")


if __name__ == "__main__":
    run.main(main, Args)
