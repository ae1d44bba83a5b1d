"""The claims' table: verdicts of known numbers, what a run's folder gives, what is kept, refusals, README."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, log_rows, module, tiny_args

from common import run
from common.tools import diagnose, report


def rows_of(file: str, metric: str, values: list[float]) -> list[dict[str, str]]:
    head = {"file": file, "env": "reacher-mini-v0", "commit": "x", "metric": metric}
    return [head | {"seed": str(seed), "value": str(v)} for seed, v in enumerate(values)]


def test_verdicts_of_known_differences():
    """All above 0, all below, both; seeds that one side lacks do not count; one is not shown, four say nothing."""
    assert diagnose.verdict([1.0, 2.0, 3.0, 1.0, 2.0]).endswith(", 5: agree")
    assert diagnose.verdict([-1.0, -2.0, -3.0, -1.0, -2.0]).endswith(", 5: **disagree**")
    assert diagnose.verdict([-1.0, 1.0, 0.2, -1.0, 1.0]).endswith(", 5: cannot tell")
    assert diagnose.verdict([1.0, 2.0, 3.0, 1.0]).endswith(", 4: too few")
    assert diagnose.verdict([5.0]) == "–"
    rows = rows_of("iql_edis", "syn/js_states", [0.5, 0.6, 0.9]) + rows_of(
        "iql_cfdg", "syn/js_states", [0.3, 0.5]
    )
    line = next(x for x in diagnose.show(rows).splitlines() if "nearer than EDIS's" in x)
    assert line.endswith("| +0.15 [-0.485, +0.785], 2: too few |")  # 0.2 and 0.1; seed 2 has no pair


def read_one(folder: Path) -> dict[str, float]:
    (found,) = report.find(folder)[1]
    return diagnose.derived(found)


def test_a_run_gives_what_claims_name(dataset, tmp_path):
    """Of iql_dare: means over its log, the gap of random exchanges; of iql_synther, rewards; of iql, nothing."""
    args = tiny_args("iql_dare", dataset=dataset, out_dir=tmp_path / "a")
    module("iql_dare").train(args)
    found, log = read_one(tmp_path / "a"), log_rows(tmp_path / "a")
    log = [{k: float(v) for k, v in x.items() if k != "phase" and v} for x in log if x["split/gap"]]
    assert found["ref/q_gain_off"] == pytest.approx(np.mean([x["ref/q_gain_off"] for x in log]))
    # of each gap, by M pairs from halves of a batch
    left = [x["split/gap"] * (1 - 2 * x["split/exchanged"] / (args.batch_size / 2)) for x in log]
    assert len(log) > 1 and found["split/gap_random"] == pytest.approx(np.mean(left))
    module("iql_synther").train(tiny_args("iql_synther", dataset=dataset, out_dir=tmp_path / "b"))
    path = max(tmp_path.glob("b/**/synthetic-?.npz"))  # the last ones
    rows = np.load(path)
    real = np.concatenate([rows["online"], rows["offline"]])[:, 14]  # 11 of the state, 3 of the action
    gain = (rows["synthetic"][:, 14].mean() - rows["online"][:, 14].mean()) / real.std()
    assert "syn/reward_gain" not in found and read_one(tmp_path / "b")["syn/reward_gain"] == pytest.approx(
        gain, rel=1e-4
    )
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path / "c"))
    assert read_one(tmp_path / "c") == {}
    assert diagnose.collect(tmp_path) == []  # settings that are not the files' own


def test_random_exchanges_have_this_gap():
    """1,000 exchanges of 3 random pairs between halves of 10: the gap's mean is gap (1 - 3/10 - 3/10)."""
    rng = np.random.default_rng(0)
    off, on, gaps = rng.normal(size=10), rng.normal(1.0, size=10), []
    for _ in range(20_000):
        i, j = rng.permutation(10)[:3], rng.permutation(10)[:3]
        a, b = off.copy(), on.copy()
        a[i], b[j] = on[j], off[i]
        gaps.append(b.mean() - a.mean())
    assert np.mean(gaps) == pytest.approx(
        (on.mean() - off.mean()) * (1 - 0.3 - 0.3), abs=4 * np.std(gaps) / 141
    )


def test_kept_rows_replace_those_of_the_same_run(tmp_path):
    path = tmp_path / "kept.csv"
    diagnose.write(rows_of("edis", "syn/online_l2", [1.0, 2.0]), path)
    diagnose.write(rows_of("edis", "syn/sim_error", [3.0]), path)  # of seed 0: the run is another one now
    kept = {(x["seed"], x["metric"]): x["value"] for x in diagnose.read(path)}
    assert kept == {("0", "syn/sim_error"): "3.0", ("1", "syn/online_l2"): "2.0"}


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"file,env,seed,commit,metric,value\nedis,e,0,c,m,nan\n", b"\xff\xfe"]
)
def test_refuses_other_files(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(run.UsageError, match=r"diagnostics\.csv"):
        diagnose.main(diagnose.Args(csv=tmp_path / "x.csv"))


def test_readme_has_the_kept_table():
    text = diagnose.show(diagnose.read(ROOT / "common" / "diagnostics.csv"))
    assert text in (ROOT / "README.md").read_text()
