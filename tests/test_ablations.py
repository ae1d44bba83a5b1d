"""The ablations' table: flags that are settings and change one, verdicts of known numbers, kept rows, README."""

import csv
import dataclasses

import pytest
from conftest import ROOT, module

from common import run
from common.tools import ablations, report


@pytest.mark.parametrize("part", ablations.ABLATIONS, ids=lambda x: f"{x.file} {x.flags}")
def test_each_changes_one_setting_of_its_method_alone(part, monkeypatch):
    """And the offline phase stays what the whole method's is: both start from one checkpoint."""
    file = module(part.file)
    preset = run.with_presets(file.Args, file.ENV_PRESETS, "reacher-mini-v0")
    monkeypatch.setattr("sys.argv", ["x", "--env", "reacher-mini-v0", *part.flags.split()])
    args = run.parse_args(file.Args, file.ENV_PRESETS)
    names = [x.name for x in dataclasses.fields(args) if getattr(args, x.name) != getattr(preset, x.name)]
    assert len(names) == 1 and names[0] not in file.OFFLINE_SETTINGS
    assert ablations.kept_flags(part.flags) == f"{names[0]}={getattr(args, names[0])}"


def rows_of(file: str, finals: list[float], flags: str = "", settings: str = "a") -> list[report.Row]:
    words = dict.fromkeys(report.WORDS, "") | {"file": file, "env": "reacher-mini-v0", "flags": flags}
    rows = []
    for seed, x in enumerate(finals):
        scores = dict(offline=50.0, final=x, last4=x, online_mean=50.0)
        rows.append(words | dict.fromkeys(report.COSTS) | scores | {"seed": str(seed), "settings": settings})
    return rows


@pytest.mark.parametrize(
    "ablated, cell, word",
    [
        ([58.0, 57.0, 66.0], "+3.0 [+0.5, +5.5]", "too few pairs"),  # 2, 3, 4 points less
        ([57.0, 57.0, 67.0, 57.0, 57.0], "+3.0 [+3.0, +3.0]", "agree"),
        ([62.0, 62.0, 72.0, 62.0, 62.0], "-2.0 [-2.0, -2.0]", "**disagree**"),
        ([60.0, 60.0, 70.0, 60.0, 60.0], "+0.0 [+0.0, +0.0]", "cannot tell"),
    ],
)
def test_verdicts_of_known_differences(ablated, cell, word):
    whole = rows_of("edis", [60.0, 60.0, 70.0, 60.0, 60.0, 10.0])  # the last seed has no pair
    text = ablations.show(whole, rows_of("edis", ablated, "policy_energy=0.0"))
    (line,) = text.splitlines()[2:]
    head = (
        f"| EDIS | `edis` | energy of the policy | `--policy-energy 0.0` | reacher-mini-v0 | {len(ablated)} |"
    )
    assert line == f"{head} {cell} | +0.0 [+0.0, +0.0] | {word} |"
    assert ablations.show(whole, rows_of("edis", [1.0], "policy_energy=0.0")).startswith("No ablation")


def test_a_run_is_compared_with_the_whole_method_from_its_own_checkpoint():
    """Which may be among the ablated ones, if another machine made both; one without is left out."""
    whole = rows_of("edis", [60.0, 60.0, 60.0])
    again = [x | {"offline": 51.0} for x in rows_of("edis", [70.0, 70.0])]
    ablated = rows_of("edis", [58.0, 58.0, 58.0], "policy_energy=0.0")
    ablated[1]["offline"], ablated[2]["offline"] = 51.0, 52.0
    (line,) = ablations.show(whole, again + ablated).splitlines()[2:]
    assert "| 2 | +7.0 [-56.5, +70.5] |" in line


def test_ablations_of_one_method_are_kept_beside_each_other(tmp_path):
    """No majority of settings between them, as there is between the seeds of one."""
    path = tmp_path / "kept.csv"
    for flags, settings in [
        ("policy_energy=0.0", "a"),
        ("state_energy=0.0", "b"),
        ("policy_energy=0.0", "a"),
    ]:
        report.keep(rows_of("edis", [1.0, 2.0], flags, settings), path)
    kept = report.read_rows(path, report.by_flags)
    assert [(x["flags"][:5], x["seed"], x["problem"]) for x in kept] == [
        ("polic", "0", ""), ("polic", "1", ""), ("state", "0", ""), ("state", "1", "")
    ]  # fmt: skip


def test_list_is_what_run_all_reads(capsys):
    ablations.main(ablations.Args(list=True))
    lines = list(csv.reader(capsys.readouterr().out.splitlines(), delimiter="\t"))
    assert lines == [[x.file, x.flags] for x in ablations.ABLATIONS]


def test_readme_has_the_kept_table():
    kept = report.read_rows(ablations.KEPT, report.by_flags)
    whole = report.read_rows(ablations.WHOLE)
    assert ablations.show(whole, kept) in (ROOT / "README.md").read_text()
    flags = {(x.file, told) for x in ablations.ABLATIONS for told in ("", ablations.kept_flags(x.flags))}
    assert kept and {(x["file"], x["flags"]) for x in kept} <= flags
