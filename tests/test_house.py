"""The house rules that a machine can check: copies, names, settings, notes, imports, branches."""

import ast
import contextlib
import dataclasses
import difflib
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import shared_blocks
import torch
from conftest import FILES, ROOT, TINY, log_rows, module, tiny_args

from common import data, run

SOURCES = {stem: (ROOT / "algorithms" / f"{stem}.py").read_text() for stem in FILES}
PLUMBING = {
    "device",
    "compile",
    "out_dir",
    "wandb",
    "tensorboard",
    "overwrite",
    "seed",
}  # read in common/run.py
UNREAD = {"from_offline", "from_behavior"}  # paths of other runs
BACKBONES = {stem: stem.split("_")[0] for stem in FILES if "_" in stem}
BACKBONES |= {"synther": "calql", "edis": "calql", "dual": "iql", "pex": "iql", "dacer": "diffql"}
LEFT_OUT = {  # whole definitions of the backbone that serve a flag which the method does not have: --distill
    "dacer": "VDenoiser rotate quiet_chain v_loss run_chain clone_loss halved_target halving_loss Distiller"
}


def code_of(source: str) -> str:
    """The source without its module docstring."""
    return source[source.index('"""', 3) + 3 :]


def without(source: str, names: list[str]) -> str:
    """The source without these functions and classes."""
    lines = source.split("\n")
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in names:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def field_comments(stem: str) -> dict[str, tuple[str, str]]:
    """Setting -> (type, trailing comment up to its source) of a file's Args."""
    body = re.search(r"class Args:\n(.*?)\n\n\n", SOURCES[stem], re.S).group(1)
    found = re.findall(r"^    (\w+): (.+?) = [^#\n]+#\s*([^\[\n:;]*)", body, re.M)
    return {name: (kind.strip(), unit.strip()) for name, kind, unit in found}


def test_shared_blocks_are_identical():
    assert shared_blocks.check(ROOT) == []


def test_the_copies_check_sees_drift(tmp_path):
    """A changed copy, a lonely fence, one name with two bodies, an unclosed fence; --fix restores the copy."""
    folder = tmp_path / "algorithms"
    folder.mkdir()
    block = "# --- shared: a.b ---\nx = 1\n# --- end shared: a.b ---\n"
    (folder / "a.py").write_text(block)
    (folder / "c.py").write_text(block.replace("x = 1", "x = 2"))
    assert shared_blocks.check(tmp_path, fix=True) == ["c.py: a.b differs from a.py"]
    assert shared_blocks.check(tmp_path) == [] and (folder / "c.py").read_text() == block
    (folder / "c.py").write_text("def f():\n    return 1\n")
    (folder / "d.py").write_text("def f():\n    return 2\n")
    problems = shared_blocks.check(tmp_path)
    assert any("only a.py" in p for p in problems) and any("2 different bodies" in p for p in problems)
    (folder / "c.py").write_text("# --- shared: a.b ---\n")
    assert "never closed" in shared_blocks.check(tmp_path)[0]


@pytest.mark.parametrize("stem", BACKBONES)
def test_a_method_is_its_backbone_plus_its_own(stem):
    """At most 40 lines of the backbone are gone, outside docstring, Args, presets and imports.

    A method that brings an actor of its own leaves out the block of the backbone's, whole: that is not counted; nor
    are definitions of LEFT_OUT.
    """
    own_actor = f"# --- shared: {BACKBONES[stem]}.actor ---" not in SOURCES[stem]

    def lines(name: str) -> list[str]:
        source = code_of(SOURCES[name])
        if own_actor:
            source = re.sub(r"# --- (shared: \w+\.actor) ---\n.*?# --- end \1 ---\n", "", source, flags=re.S)
        if name != stem:
            source = without(source, LEFT_OUT.get(stem, "").split())
        return [x for x in source[source.index("OFFLINE_SETTINGS") :].split("\n") if x.strip()]

    changes = difflib.unified_diff(lines(BACKBONES[stem]), lines(stem), lineterm="", n=0)
    removed = [x for x in changes if x.startswith("-") and not x.startswith("---")]
    assert len(removed) <= 40, removed


@pytest.mark.parametrize("stem", FILES)
def test_notes_in_code_and_docstring_are_the_same(stem):
    source = SOURCES[stem]
    ids = r"\b[DU]\d+\b"
    told, used = set(re.findall(ids, source[: source.index('"""', 3)])), set(re.findall(ids, code_of(source)))
    assert told == used, (
        f"explained, not in the code: {told - used}; in the code, not explained: {used - told}"
    )


@pytest.mark.parametrize("stem", FILES)
def test_every_setting_is_read_and_has_a_comment(stem):
    names = {f for f in module(stem).Args.__dataclass_fields__}
    read = set(re.findall(r"\bargs\.(\w+)", code_of(SOURCES[stem])))
    listed = set(module(stem).OFFLINE_SETTINGS)
    assert names - read - PLUMBING == set()
    assert listed <= names
    assert names - set(field_comments(stem)) == set(), "settings without a comment"


def test_a_setting_means_the_same_in_every_file():
    seen: dict[str, dict] = {}
    for stem in FILES:
        for name, meaning in field_comments(stem).items():
            seen.setdefault(name, {})[stem] = meaning
    assert {k: v for k, v in seen.items() if len(set(v.values())) > 1} == {}


@pytest.mark.parametrize("stem", FILES)
def test_numeric_settings_have_limits_and_right_types(stem):
    """The range stands with the setting, as run.check_limits reads it."""
    args = module(stem).Args()
    run.check_limits(args)
    hints = get_type_hints(module(stem).Args, include_extras=True)
    for name, hint in hints.items():
        value = getattr(args, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            (limits,) = hint.__metadata__
            assert re.fullmatch(r"[\[(](-?[0-9]+|-inf), (-?[0-9]+|inf)[\])]", limits), name
            assert type(value) is hint.__origin__, name


@pytest.mark.parametrize("stem", FILES)
def test_presets_fit_settings_and_tasks(stem):
    algorithm = module(stem)
    fields = algorithm.Args.__dataclass_fields__
    for prefix, row in algorithm.ENV_PRESETS.items():
        assert any(name.startswith(prefix) for name in data.TASKS), f"no task starts with {prefix}"
        for k, v in row.items():
            assert type(v) is type(fields[k].default), f"{prefix}: {k}"
    for name in data.TASKS:
        run.check_limits(run.with_presets(algorithm.Args, algorithm.ENV_PRESETS, name))


def test_importing_does_nothing_and_needs_no_wandb_gpu_or_network(tmp_path):
    """No wandb import, no socket, no CUDA initialisation, no argument parsing, no file."""
    program = f"""
import socket, sys
def no(*_, **__): raise AssertionError("not at import")
socket.socket.connect = no
sys.modules["wandb"] = None
sys.modules["matplotlib"] = None
sys.argv = ["x", "--nonsense"]
import importlib, torch
for stem in {FILES!r}:
    importlib.import_module("algorithms." + stem)
assert not torch.cuda.is_initialized()
print("quiet")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "quiet\n" and not list(tmp_path.iterdir())


def test_help_by_path_from_another_directory(tmp_path):
    """A process each for two files; one after the other in a third for all, as importing torch takes its seconds."""
    paths = {stem: str(ROOT / "algorithms" / f"{stem}.py") for stem in FILES}
    program = f"""
import runpy, sys
for stem, path in {paths!r}.items():
    sys.argv = [path, "--help"]
    print("help of", stem)
    try:
        runpy.run_path(path, run_name="__main__")
        sys.exit(f"{{stem}} goes on")
    except SystemExit as e:
        assert not e.code, (stem, e.code)
"""
    for command in ([paths["iql"], "--help"], [paths["so2_dual"], "--help"], ["-c", program]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = done.stdout.split("help of ")[1:] or [done.stdout]
        assert len(told) == (len(FILES) if command[0] == "-c" else 1) and all("--gamma" in x for x in told)


def test_a_new_algorithm_edits_no_other_file(dataset, tmp_path):
    """A copy of iql.py with a setting and a loss term of its own runs from anywhere, and its range is kept."""
    copy, source = tmp_path / "iql_mine.py", SOURCES["iql"]
    changes = {
        "    # online\n": "    pull: Weight = 0.1  # NEW: weight of the actor's mean, squared\n    # online\n",
        "actor_loss = ": "actor_loss = args.pull * mean.square().mean() + ",
    }
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    copy.write_text(source)

    def start(*flags: str) -> subprocess.CompletedProcess:
        known = module("iql").Args.__dataclass_fields__
        sizes = [f"{run.flag(k)}={v}" for k, v in TINY.items() if k in known]
        command = [sys.executable, copy, "--env=hopper-medium-v2", f"--dataset={dataset}", *sizes, *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = start("--pull=0.5")
    assert done.returncode == 0, done.stderr
    (args,) = tmp_path.glob("runs/iql_mine/*/seed0/args.json")
    assert json.loads(args.read_text())["settings"]["pull"] == {"value": 0.5, "origin": "flag"}
    refused = start("--pull=-1", "--overwrite")
    assert refused.returncode == 2 and refused.stderr == "error: --pull: got -1.0; allowed: [0, inf)\n"


# ---- settings without effect ----


def others(algorithm, name: str) -> list:
    """Other values of a setting, inside its range: the other words, the other switch, 0 and what is near."""
    value, hint = getattr(algorithm.Args(), name), get_type_hints(algorithm.Args, include_extras=True)[name]
    if type(value) is bool:
        return [not value]
    if get_origin(hint) is Literal:
        return [x for x in get_args(hint) if x != value]
    if hasattr(hint, "__metadata__"):
        candidates, found = [0, -1, 2 * value, value / 2, value + 1, value - 1], []
        for x in candidates:
            with contextlib.suppress(run.UsageError):
                run.check_limits(algorithm.Args(**{name: type(value)(x)}))
                found.append(type(value)(x))
        return [x for x in found if x != value] or [0.5]
    return [Path("elsewhere")] if "Path" in str(hint) else []


def another(algorithm, name: str):
    """One other value; of a size, one beside what tests use instead of the published one."""
    return TINY[name] + 1 if type(TINY.get(name)) is int else others(algorithm, name)[-1]


def unless(stem: str, condition: str) -> dict:
    """A setting that makes `condition` false; none if the defaults do."""
    algorithm = module(stem)
    names = [name for name in algorithm.Args.__dataclass_fields__ if re.search(rf"\b{name}\b", condition)]
    ones = [{name: x} for name in names for x in others(algorithm, name)]
    together = [dict.fromkeys(names, 4), dict.fromkeys(names, 0.0)]
    for changes in [{}, *ones, *together]:
        if not eval(condition, {}, vars(tiny_args(stem, **changes))):
            return changes
    raise AssertionError(f"{stem}: nothing makes this false: {condition}")


@functools.cache
def trained(stem: str, changes: tuple, dataset: Path) -> tuple[dict, Path]:
    """A short run: its result and the folder with its log. Its code reads every setting but those it names as idle."""
    algorithm, seen = module(stem), set()
    out = dataset.parent / "-".join([stem, *(f"{k}={v}" for k, v in changes)])
    args = tiny_args(stem, dataset=dataset, out_dir=out, online_steps=40, **dict(changes))
    known = set(algorithm.Args.__dataclass_fields__)

    def spy(args, name):
        reader = sys._getframe(1).f_code.co_filename
        if name in known and reader not in (run.__file__, dataclasses.__file__):
            seen.add(name)
        return object.__getattribute__(args, name)

    with pytest.MonkeyPatch.context() as patch:
        for name in [x for x in vars(algorithm) if x.endswith("_SETTINGS")]:
            patch.setattr(algorithm, name, ())  # what a checkpoint depends on
        patch.setattr(algorithm.Args, "__getattribute__", spy)
        result = algorithm.train(args)
    unread = known - seen - PLUMBING - UNREAD
    assert unread <= idle(stem, args), "settings without effect that the file does not name"
    return result, out


def idle(stem: str, args) -> set[str]:
    """Settings that the file says have no effect beside the others."""
    needs = getattr(module(stem), "NEEDS", {})
    return {name for x, names in needs.items() if not eval(x, {}, vars(args)) for name in names}


def independent(stem: str) -> list[tuple[str, ...]]:
    """The file's conditions, those together that have no setting in common: one run tests them all."""
    found: list[tuple[tuple[str, ...], set[str]]] = []
    for condition, names in getattr(module(stem), "NEEDS", {}).items():
        words = {*re.findall(r"[a-z]\w+", condition), *names} - {"or", "and", "not"}
        i = next((i for i, (_, known) in enumerate(found) if not known & words), len(found))
        conditions, known = found[i] if i < len(found) else ((), set())
        found[i:] = [((*conditions, condition), known | words), *found[i + 1 :]]
    return [conditions for conditions, _ in found]


NEEDS = [pytest.param(stem, x, id=f"{stem}-{'; '.join(x)}") for stem in FILES for x in independent(stem)]


@pytest.mark.parametrize(("stem", "conditions"), NEEDS)
def test_settings_that_are_refused_have_no_effect(stem, conditions, random_rows, tmp_path, monkeypatch):
    """Unless its condition holds: other values leave the log as it is; and no setting is unread but those named."""
    algorithm, changes = module(stem), {}
    for condition in conditions:
        changes |= unless(stem, condition)
    names = [k for condition in conditions for k in algorithm.NEEDS[condition]]
    common = dict(dataset=random_rows, online_steps=40) | changes
    for condition in conditions:
        name = algorithm.NEEDS[condition][0]
        other = common | {name: another(algorithm, name)}
        with pytest.raises(run.UsageError, match=f"{run.flag(name)}: .*no effect unless"):
            algorithm.train(tiny_args(stem, out_dir=tmp_path, **other))
    _, plain = trained(stem, tuple(changes.items()), random_rows)
    for k in (k for k in names if k not in changes and others(algorithm, k)):
        common[k] = another(algorithm, k)
    monkeypatch.setattr(algorithm, "NEEDS", {})
    algorithm.train(tiny_args(stem, out_dir=tmp_path, **common))
    told = ("loss/", "eval/", "train/", "syn/")  # not what is logged of the settings themselves
    logs = [
        [{k: v for k, v in r.items() if k.startswith(told)} for r in log_rows(x)] for x in (plain, tmp_path)
    ]
    assert logs[0] == logs[1]


# sparse_reward changes nothing on dense rewards, offline_upsample does not calibrate, eval_halvings only adds columns
# to the log, time_acting trains nothing: tests of their own
ELSEWHERE = (
    "wandb",
    "tensorboard",
    "overwrite",
    "sparse_reward",
    "offline_upsample",
    "eval_halvings",
    "time_acting",
)
SWITCHES = [
    (stem, name)
    for stem in FILES
    for name, field in module(stem).Args.__dataclass_fields__.items()
    if type(field.default) is bool and name not in ELSEWHERE
]


@pytest.mark.parametrize(("stem", "name"), SWITCHES)
def test_training_with_each_switch_flipped(stem, name, random_rows):
    """Branches that only a non-default flag reaches still train, and change the run."""
    on = module(stem).Args.__dataclass_fields__[name].default
    plain, _ = trained(stem, (), random_rows)
    result, _ = trained(stem, ((name, not on),), random_rows)
    assert all(abs(result[k]) < 1e4 for k in ("offline_score", "final_score"))
    assert result["final_score"] != plain["final_score"]


@pytest.mark.parametrize("stem", FILES)
def test_no_host_reads_in_updates(stem):
    """No .item(), float(tensor), print or numpy inside the functions that a gradient step is made of."""
    tree = ast.parse(SOURCES[stem])
    step = (
        "losses update dare_losses stratdiff_losses exchange sorted_exchange gaussian_threshold split alignment score "
        "behavior_loss behavior_step energy_loss energy_step guided_eps offline_step "
        "online_step train_step sample_step union_rows next_labels conservative_gap "
        "squash squashed_log_std q_of_many draw_noise max_target_q frozen_q "
        "pool_step groups group_losses gradient real made with_policy weigh info_nce "
        "scorer_step scorer_losses ratio_loss one_step_error q_advantage draw begin amplified "
        "planner_step distill_step descend planner_loss distill_loss distill_target noised masked_error in_paint "
        "transition_step transition_loss null box "
        "rotate unroll take features read predict prediction_error observe gradient_step ensemble "
        "dual_losses boxed log_prob bounded_weight posterior_weight "
        "pex_losses compose choice_probs "
        "normed q_of_drawn td_loss critic_losses policy_losses draw_critics draw_offline learn follow "
        "draw_oorb draw_pair "
        "own_targets value_losses actor_losses dual_actor_losses ratio_losses draw_perturbation draw_own "
        "draw_plain assign _find "
        "draw_step draw_chain run_chain noisy_chain quiet_chain rotate bc_loss v_loss clone_loss next_q "
        "normalised_q_loss halved_target halving_loss halving_step "
        "m_step e_step half_log_det seed_shares fit_mixture mixture_entropy perturbed policy_entropy regulate draw_xi "
        "next_q_with_noise dacer_losses online_step "
        "weighted labelled guide_loss posterior value_gradient guided_plans starts pick_actions move_average "
        "follow_loss follow_step guide_step"
    )
    reads = r"\.item\(|\.tolist\(|\.cpu\(|\.numpy\(|print\(|(?<!\.)\bfloat\(|nonzero"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in step.split():
            text = ast.unparse(node)
            assert not re.search(reads, text), node.name


@pytest.mark.parametrize("stem", FILES)
def test_settings_are_frozen(stem):
    args = module(stem).Args()
    with pytest.raises(AttributeError):
        args.lr = 1.0


def test_one_torch_thread_in_tests():
    assert torch.get_num_threads() == 1


# ---- modules ----


def imports() -> dict[str, set[str]]:
    """Module -> modules of this project that its code imports, anywhere in it."""
    found = {}
    paths = [p for folder in ("common", "common/tools", "algorithms") for p in ROOT.glob(f"{folder}/*.py")]
    for path in sorted(paths):
        name, known = ".".join(path.relative_to(ROOT).with_suffix("").parts), set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for inside in (f"{node.module}.{x.name}" for x in node.names):  # a module, or a name in one
                    is_module = (ROOT / (inside.replace(".", "/") + ".py")).exists()
                    known.add(inside if is_module else node.module)
            elif isinstance(node, ast.Import):
                known |= {x.name for x in node.names}
        found[name] = {x for x in known if x.split(".")[0] in ("common", "algorithms")}
    return found


def test_modules_import_each_other_without_a_circle_and_no_algorithm_a_tool():
    graph = imports()
    seen = {f"common.{x}" for x in ("data", "edm", "judge", "run")}
    assert graph["algorithms.edis"] >= seen
    for name, known in graph.items():
        assert not any(x.startswith("algorithms.") for x in known), f"{name} imports an algorithm"
        assert name.startswith("common.tools.") or not any(x.startswith("common.tools") for x in known), name
    left = dict(graph)
    while left:
        free = [name for name, known in left.items() if not known & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {name: known for name, known in left.items() if name not in free}
