"""The latency table: what is timed is what acts, its network is evaluated as often as its file says, README has it."""

import importlib
from collections import Counter

import acting
import bench
import pytest
from conftest import CPU, TINY

WIDTHS = ["hidden", "planner_width", "planner_blocks"]
WIDTHS += ["batch_size", "planner_batch", "laplace_rows", "laplace_draws"]
# evaluations of a denoising network for one action, by hand from published settings: T, and for DUAL those of the
# frozen model's next state; Diffuser: 20 steps, two guided moves in all but the last two, one value of the plans
EVALUATIONS = {
    "DUAL": 1 + 1,
    "DUAL w/o planner": 1,
    "DUAL w/o distillation": 32 + 32,
    "DUAL w/o epistemic UQ": 1 + 1,
    "DUAL w/o shift-aware": 1,
    "D-Diffuser": 1 + 1,
    "Diffuser": 20 + 2 * 18 + 1,
    "D-Diff-QL": 1,
    "Diff-QL": 5,
    "DACER": 5,
    "DACER, entropy at every action": 5 + 5,
    "IQL": 0,
    "SO2": 0,
}


@pytest.mark.parametrize("name", acting.POLICIES)
def test_networks_are_evaluated_as_often_as_an_action_needs(name, monkeypatch):
    """Of published settings, but for widths and batches, which take time and change no count."""
    calls, few = Counter(), bench.few

    def narrow(module, *sizes, **flags):
        known = {k: TINY[k] for k in WIDTHS if k in module.Args.__dataclass_fields__}
        return few(module, *sizes, **known | flags)

    monkeypatch.setattr(bench, "few", narrow)
    for stem in ("dual", "diffuser", "diffql", "dacer"):
        module = importlib.import_module(f"algorithms.{stem}")
        for net, method in (("PlannerNet", "features"), ("Denoiser", "forward")):
            if kind := getattr(module, net, None):
                original = getattr(kind, method)

                def counted(self, *inputs, original=original):
                    calls["evaluations"] += 1
                    return original(self, *inputs)

                monkeypatch.setattr(kind, method, counted)
    act = acting.action(name, CPU)
    calls.clear()
    result = act()
    assert calls["evaluations"] == EVALUATIONS[name]
    actions = result[0] if isinstance(result, tuple) else result
    assert actions.shape == (1, bench.ACT) and actions.abs().max() <= 1


def test_readme_has_the_kept_table(tmp_path, capsys):
    """Byte for byte what --from-csv writes, which is also what it prints; every policy is in it."""
    copy, text = tmp_path / "README.md", (bench.ROOT / "README.md").read_text()
    begin, end = (text.index(m) for m in acting.MARKERS)
    copy.write_text(text[: begin + len(acting.MARKERS[0])] + text[end:])
    kept = bench.ROOT / "tests" / "acting.csv"
    acting.main(acting.Args(csv=kept, readme=copy, from_csv=True))
    assert copy.read_text() == text
    assert capsys.readouterr().out.strip() == text[begin + len(acting.MARKERS[0]) : end].strip()
    rows = bench.read_rows(kept, acting.COLUMNS)
    assert [r["policy"] for r in rows] == [*acting.POLICIES]
    assert "dual --distill-steps 32" in [r["command"] for r in rows]


def test_published_ratios_are_those_of_table_4():
    latency = {"DUAL w/o planner": 777.22, "DUAL w/o distillation": 24953.11, "DUAL w/o epistemic UQ": 775.18}
    latency |= {"DUAL w/o shift-aware": 798.93, "DUAL": 800.22}
    for name, milliseconds in latency.items():
        assert float(acting.POLICIES[name][2]) == pytest.approx(milliseconds / 800.22, abs=0.02)
