"""policy.pt2: what a run evaluates, in a process that does not know this project."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CPU, FILES, HOPPER, module, tiny_args

from common import data, envs, policy, run

BARE = """
import sys
sys.modules["common"] = sys.modules["algorithms"] = None  # importing them raises
import torch
for line in sys.stdin:
    wanted, found = line.strip().split("\\t")
    rows = torch.load(wanted, weights_only=True)
    acts = {}
    for path in rows["paths"]:
        act = torch.export.load(path).module()
        torch.manual_seed(0)
        acts[path] = act(rows["obs"])
        if len(act(rows["obs"][:1])) != 1:
            sys.exit("one row is refused")
    torch.save(acts, found)
    print("done", flush=True)
"""
DRAWS = {
    "dacer",
    "diffql",
    "diffuser",
    "pex",
    "pex_cfdg",
}  # no deterministic form; PEX: 10 % of its evaluation, D71
RAW = np.random.default_rng(0).normal(0, 2, (7, 11))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Callable[[Path, Path], None]:
    """Has a process without this project load rows and paths, and save what each path's policy does with the rows.

    One for all: half of each answer would be the import of torch."""
    script, folder = (sys.executable, "-c", BARE), tmp_path_factory.mktemp("bare")
    with subprocess.Popen(script, cwd=folder, stdin=PIPE, stdout=PIPE, text=True) as process:

        def ask(rows: Path, acts: Path) -> None:
            print(rows, acts, sep="\t", file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n", "it died, as its stderr says"

        yield ask
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture
def told(monkeypatch) -> list:
    """(policy, file's content) of every export."""
    found, save = [], policy.save

    def spy(raw: policy.Raw, about: dict, path: Path) -> bool:
        state = torch.get_rng_state()
        drawn = save(raw, about, path)
        assert torch.equal(state, torch.get_rng_state())
        found.append((raw, path.read_bytes()))
        return drawn

    monkeypatch.setattr(policy, "save", spy)
    return found


@pytest.mark.parametrize("stem", FILES)
def test_a_bare_process_acts_as_the_run_does(stem, dataset, tmp_path, told, bare, capsys):
    """At the end of the offline phase and of the run, on raw observations, with the run's normalisation."""
    norm = "normalize_obs" in module(stem).Args.__dataclass_fields__
    args = tiny_args(stem, dataset=dataset, out_dir=tmp_path, **{"normalize_obs": True} if norm else {})
    module(stem).train(args)
    units = data.Units(moments=data.load(HOPPER, dataset).moments() if norm else None)
    (_, first), (online, second) = told
    assert ("no deterministic form" in capsys.readouterr().out) == (stem in DRAWS)
    paths = [str(tmp_path / f"{k}.pt2") for k in ("offline", "online")]
    for path, content in zip(paths, (first, second), strict=True):
        Path(path).write_bytes(content)
        about = policy.load(Path(path))[1]
        expected = {
            "task": HOPPER,
            "file": stem,
            "seed": 0,
            "obs_dim": 11,
            "act_dim": 3,
            "draws": stem in DRAWS,
        }
        expected["draws"] &= not (path == paths[0] and stem[:3] == "pex")
        assert {k: about[k] for k in expected} == expected and about["phase"] == Path(path).stem
    torch.manual_seed(0)
    wanted = online.act(torch.from_numpy(units.obs(RAW).astype(np.float32))).clamp(-1, 1)
    torch.save({"paths": paths, "obs": torch.from_numpy(RAW).float()}, tmp_path / "rows.pt")
    bare(tmp_path / "rows.pt", tmp_path / "acts.pt")
    acts = torch.load(tmp_path / "acts.pt", weights_only=True)
    print(f"{stem}: differs by {(acts[paths[1]] - wanted).abs().max():.1e}, {len(second) / 1e3:.0f} KB")
    torch.testing.assert_close(acts[paths[1]], wanted, atol=1e-5, rtol=0)
    assert not torch.equal(acts[paths[0]], acts[paths[1]]) and acts[paths[0]].shape == (7, 3)
    assert (args.out_dir / stem / f"{HOPPER}@{dataset.stem}" / "seed0" / "policy.pt2").read_bytes() == second


@pytest.mark.parametrize(
    ("stem", "changes"),
    [
        ("pex", {"eval_random": 0.0}),
        ("diffql", {"distill": True}),
        ("diffuser", {"distill": True}),
        ("diffuser", {"guide_repeats": 0}),
        ("dual", {"latent": "sample"}),
        ("calql_dual", {"uq": "latent"}),
        ("iql", {"dropout": 0.5}),
    ],
)
def test_other_forms_of_the_policy_are_exported_as_they_act(stem, changes, dataset, tmp_path, told):
    """Settings that change what acts; dropout is not in evaluation, so that nothing is drawn for it."""
    module(stem).train(tiny_args(stem, dataset=dataset, out_dir=tmp_path, **changes))
    raw, content = told[-1]
    (tmp_path / "policy.pt2").write_bytes(content)
    act, about = policy.load(tmp_path / "policy.pt2")
    obs, got = torch.from_numpy(RAW).float(), []
    for which in (act, raw):
        torch.manual_seed(0)
        got.append(which(obs))
    torch.testing.assert_close(*got, atol=1e-5, rtol=0)
    assert about["draws"] == (stem in DRAWS)


def test_evaluation_seeds_what_a_policy_draws():
    """Twice the same score, other seeds others, and the run's own random numbers are left alone."""
    task, seen = data.get_task("reacher-mini-v0"), []

    def drawing(obs: torch.Tensor) -> torch.Tensor:
        return torch.rand(obs.shape[0], 2) * 2 - 1

    torch.manual_seed(5)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        seen.append(data.Evaluator(task, 2, seed)(drawing, CPU)["eval/return"])
        torch.rand(1)
        torch.set_rng_state(before)
    assert seen[0] == seen[1] != seen[2] and torch.equal(before, torch.get_rng_state())


def test_actions_are_in_the_box_of_the_environment(tmp_path):
    """A box that is not [-1, 1], as Minari's may be: its middle plus half its width times the action."""
    env = envs.flat(lambda: gym.make("Pendulum-v1"))  # torque in [-2, 2]

    def act(obs: torch.Tensor) -> torch.Tensor:
        return obs[:, :1]

    raw = policy.Raw(act, None, env.center, env.half, CPU)
    policy.save(raw, {"obs_dim": 3}, tmp_path / "policy.pt2")
    module, about = policy.load(tmp_path / "policy.pt2")
    got = module(torch.tensor([[0.5, 0, 0], [7.0, 0, 0]]))
    assert got.tolist() == [[1.0], [2.0]] and about["draws"] is False


def test_a_policy_that_cannot_be_exported_stops_no_run(dataset, tmp_path, monkeypatch, capsys):
    """An action that depends on the number of rows as Python sees it: a warning, a whole run, no stale file."""
    export, phases = data.Evaluator.export, []

    def spoiled(evaluate: data.Evaluator, act, r: run.Run) -> None:
        phases.append(r.current)
        export(evaluate, act if r.current == "offline" else lambda obs: act(obs) * len(obs), r)

    monkeypatch.setattr(data.Evaluator, "export", spoiled)
    final = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    err = capsys.readouterr().err
    assert phases == ["offline", "online"] and "final_score" in final
    assert err.count("warning: no ") == 1 and "policy.pt2: " in err and not [*tmp_path.glob("**/policy.pt2")]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 and no more", "half"])
def test_what_is_no_policy_is_named(content, tmp_path):
    path = tmp_path / "policy.pt2"
    if content == "half":
        policy.save(policy.Raw(lambda obs: obs, None, 0.0, 1.0, CPU), {"obs_dim": 3}, path)
        content = path.read_bytes()[:2_000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(run.UsageError, match=r"policy: got .*allowed: an intact policy.pt2"):
        policy.load(path)


def test_a_policy_is_never_half_written(tmp_path, monkeypatch):
    """A full disk leaves the file of before."""
    path = tmp_path / "policy.pt2"
    policy.save(policy.Raw(lambda obs: obs, None, 0.0, 1.0, CPU), {"obs_dim": 3}, path)
    before = path.read_bytes()

    def full(_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        policy.save(policy.Raw(torch.tanh, None, 0.0, 1.0, CPU), {"obs_dim": 3}, path)
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1
