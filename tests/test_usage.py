"""`--help` of an algorithm: every setting once, in its group, with default, the task's preset, range and meaning."""

import re
import subprocess
import sys
from typing import get_type_hints

import pytest
from conftest import FILES, ROOT, module

from common import run, usage

FLAG = re.compile(r"^  --([a-z0-9-]+)", re.M)


def text_of(stem: str, env: str = "hopper-medium-v2") -> str:
    algorithm = module(stem)
    return usage.help_text(run.with_presets(algorithm.Args, algorithm.ENV_PRESETS, env))


def entries(text: str) -> dict[str, str]:
    """Flag -> what is said of it, on one line."""
    body = text[text.index("\nrun\n") :]
    parts = re.split(r"\n(?=\S|  --|\n)", body)
    return {m[1]: " ".join(part.split()) for part in parts if (m := FLAG.match(part))}


def class_body(stem: str) -> str:
    source = (ROOT / "algorithms" / f"{stem}.py").read_text()
    return re.search(r"class Args:\n(.*?)\n\n\n", source, re.S).group(1)


@pytest.mark.parametrize("stem", FILES)
def test_every_setting_stands_there_once_with_its_comment(stem):
    text = text_of(stem)
    names = [run.flag(x)[2:] for x in module(stem).Args.__dataclass_fields__]
    assert sorted(FLAG.findall(text)) == sorted(names)
    for name, comment in re.findall(r"^    (\w+): .*  # (.*)$", class_body(stem), re.M):
        assert " ".join(comment.split()) in entries(text)[run.flag(name)[2:]]
    assert max(map(len, text.split("\n"))) <= 100


@pytest.mark.parametrize("stem", FILES)
def test_groups_come_in_the_order_of_the_class(stem):
    """Each with its own settings; no group is longer than a screen."""
    found = usage.groups(module(stem).Args)
    headings = list(dict.fromkeys(["run", *re.findall(r"^    # (.+)$", class_body(stem), re.M)]))
    assert list(found) == headings and max(map(len, found.values())) <= 21
    text = text_of(stem)
    places = [text.index(f"\n\n{x}\n") for x in headings]
    assert places == sorted(places)
    for heading, settings in found.items():
        part = text[text.index(f"\n\n{heading}\n") + 2 :].split("\n\n")[0]
        assert FLAG.findall(part) == [run.flag(x)[2:] for x in settings]


@pytest.mark.parametrize("stem", FILES)
def test_ranges_words_defaults_and_presets_are_shown(stem):
    algorithm, env = module(stem), "hopper-mini-v0"
    told, hints = entries(text_of(stem, env)), get_type_hints(algorithm.Args, include_extras=True)
    preset = run.with_presets(algorithm.Args, algorithm.ENV_PRESETS, env)
    for name, hint in hints.items():
        line, value = told[run.flag(name)[2:]], getattr(algorithm.Args(), name)
        for limits in getattr(hint, "__metadata__", ()):
            assert f" in {limits} default" in line
        if isinstance(value, bool):
            assert f"--{name}, --no-{name} ".replace("_", "-") in line
        assert f" default {usage.shown(value)}" in line
        here = getattr(preset, name)
        assert (f"; {env}: {usage.shown(here)}" in line) == (here != value and name != "env")
    assert (
        "hopper-mini-v0: 6_000" in told["online-steps"] and "{auto,cpu,cuda} default auto" in told["device"]
    )


def test_what_a_setting_needs_is_said():
    told = entries(text_of("calql_dare"))
    assert told["energy-lr"].endswith("only if exchange_cap != 0 and guidance_scale > 0")
    assert "only if" not in told["exchange-cap"]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_lines_fit_the_terminal(columns, monkeypatch):
    """But for a flag of a switch, which is not broken."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = text_of("wsrl", "hopper-mini-v0").split("\n")
    longest = max(len(x) for x in lines if not re.fullmatch(r"usage: .*|  --(\S+), --no-\S+", x))
    assert longest <= min(columns, 100)


@pytest.mark.parametrize("shown", ["1_000_000", "0.0003", "3", "1e-05"])
def test_numbers_may_be_typed_as_they_are_shown(shown, monkeypatch):
    kind = "--offline-steps" if "_" in shown else "--lr"
    monkeypatch.setattr(sys, "argv", ["iql.py", kind, shown])
    args = run.parse_args(module("iql").Args, module("iql").ENV_PRESETS)
    assert usage.shown(getattr(args, kind[2:].replace("-", "_"))) == shown


def start(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "algorithms" / "iql.py", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = start("--env=pen-human-v1", "--help", "--env", "reacher-mini-v0")
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    first, _, claim = done.stdout.split("\n")[:3]
    assert first.startswith("usage: python algorithms/iql.py ") and claim.startswith("Implicit Q-learning, ")
    assert "default 1_000_000; reacher-mini-v0: 4_000" in done.stdout


def test_an_unknown_task_is_refused_in_one_line():
    done = start("-h", "--env", "hoper")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --env: got hoper; allowed: ") and done.stderr.count("\n") == 1
