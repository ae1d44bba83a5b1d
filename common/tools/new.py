"""Start a method of your own: a file of algorithms/ under a new name, with what every method brings, marked NEW.

    python -m common.tools.new iql my_method              writes algorithms/iql_my_method.py, which runs at once

NEW are a setting with its range, a loss term, a preset of the embedded tasks, a note, and a head of the docstring. The
term is a placeholder: your equation replaces it. With the setting at 0 the file trains as its source does, number for
number.

The fences of shared blocks are taken off, so that every line may be changed. What stays is that a name has one body in
all files (tests/shared_blocks.py): a function or class that you change needs a name of its own, value_loss for instance
value_loss_my_method. Args, ENV_PRESETS, losses, update and train are free.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated

import tyro

from common import run

FOLDER = Path(__file__).parents[2] / "algorithms"
FENCES = re.compile(r"^# --- (end )?shared: \S+ ---\n", re.M)

SETTING = """\
    # NEW: {name}
    {name}_weight: Weight = 0.0  # factor of its loss; 0: as {source}.py: {note}"""
PRESET = '    **{{k: dict({name}_weight=0.01) for k in ("hopper-mini-", "reacher-mini-")}},  # NEW: {note}'
OFFLINE_SETTING = '    "{name}_weight",  # NEW: the term acts in the offline phase'
LOSS = '''\
# NEW: {name}, its loss.
def {name}_loss(q: torch.Tensor) -> torch.Tensor:
    """Mean of Q², q of any shape -> (): in place of the paper's equation."""
    return q.square().mean()

'''
TERM = """\
    term = args.{name}_weight * {name}_loss(q)  # NEW
    logs["loss/{name}"] = term  # NEW
    total = {total} + term  # NEW
    return total, {logs}"""
HEAD = """\
{name} on {source}.py: NEW, what it adds, in one sentence.

NEW      Paper: authors, title, venue, arXiv, code. Read: {name}_loss, losses.
Source   What is not marked NEW: {name} is {source}.py's, as is the rest of this page.
         {claim}

"""
NOTE = """\
Notes    {note} NEW: {name}_loss is a placeholder, and its weight on the embedded tasks a guess.
         """
STEPS = """\
{path}: search it for NEW and replace the placeholder
  run    python algorithms/{stem}.py --env reacher-mini-v0
  test   uv run pytest tests/test_house.py -k "{stem} or shared"
         (a function that you change, but losses, update and train, needs a name of its own: one name, one body)
  lint   uv run ruff check . && uv run ruff format .
  study  run_all.sh: a row `method {stem} HOURS TASKS`, and its name in the first line of `backbone`, as long as
         OFFLINE_SETTINGS has {name}_weight; common/tools/report.py: a row of METHODS. Without them, and a paper's
         numbers, tests/test_{{run_all,report,presets}}.py fail: they want every file to be some paper's"""


Source, Name = (Annotated[str, tyro.conf.arg(metavar=x)] for x in ("SOURCE", "NAME"))


@dataclass(frozen=True)
class Args:
    """Write algorithms/SOURCE_NAME.py, a new method on an algorithm that is there."""

    source: tyro.conf.Positional[Source]  # a file in algorithms/, without .py: a backbone or a method
    name: tyro.conf.Positional[Name]  # of the new method, as in my_method


def defined(text: str) -> dict[str, ast.stmt]:
    """Name -> the top-level statement that defines or assigns to it."""
    found = {}
    for node in ast.parse(text).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        found |= {getattr(x, "name", None) or getattr(x, "id", None): node for x in targets}
    return found


def next_note() -> str:
    """The ID of an unspecified choice that no file has yet."""
    texts = (path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    return f"U{1 + max(int(n) for text in texts for n in re.findall(r'U([0-9]+)', text))}"


def with_method(text: str, source: str, name: str, note: str) -> str:
    """The text of algorithms/<source>.py as that of the new file; UsageError if there is no place for a loss term."""
    text = re.sub(r"\n{4,}", "\n\n\n", FENCES.sub("", text))
    nodes = defined(text)
    args, presets, settings, losses = map(nodes.get, ("Args", "ENV_PRESETS", "OFFLINE_SETTINGS", "losses"))
    result = losses.body[-1].value if losses else None  # of its return
    locals_ = {x.id for x in ast.walk(losses or ast.Module()) if isinstance(x, ast.Name)}
    if not isinstance(result, ast.Tuple) or not {"q", "logs"} <= locals_:
        allowed = "one with a function `losses` that has q and logs and returns a loss and logs; copy this one by hand"
        raise run.UsageError("source", f"{source}.py", allowed)
    total, logs = (ast.get_source_segment(text, x) for x in result.elts)
    words = dict(source=source, name=name, note=note, total=total, logs=logs)
    lines = text.split("\n")
    inserted = {  # before which line, counted from 1
        args.end_lineno + 1: SETTING,
        presets.end_lineno: PRESET,
        settings.end_lineno: OFFLINE_SETTING,
        losses.lineno: LOSS,
        losses.body[-1].lineno: TERM,
    }
    del lines[losses.body[-1].lineno - 1 : losses.end_lineno]  # the return
    for at in sorted(inserted, reverse=True):
        lines.insert(at - 1, inserted[at].format(**words))
    _, page, code = "\n".join(lines).split('"""', 2)
    claim, page = page.split("\n\n", 1)
    claim = fill(" ".join(claim.split()), 110, initial_indent="", subsequent_indent=" " * 9)
    page = page.replace(f"algorithms/{source}.py", f"algorithms/{source}_{name}.py")
    page = "\n".join(fill(x, 120, subsequent_indent=" " * 9) if len(x) > 120 else x for x in page.split("\n"))
    page = page.replace("Notes    ", NOTE.format(**words), 1)
    ranges = re.search(r"^from common\.run import (.+)$", code, re.M)
    code = code.replace(ranges[1], ", ".join(sorted({"Weight", *ranges[1].split(", ")})), 1)
    return f'"""{HEAD.format(claim=claim, **words)}{page}"""{code}'


def main(args: Args) -> None:
    source, name = args.source, args.name
    known = sorted(path.stem for path in FOLDER.glob("*.py"))
    if source not in known:
        raise run.UsageError("source", source, ", ".join(known))
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > 30:
        raise run.UsageError(
            "name", name, "lower-case letters, digits and single _, a letter first, at most 30"
        )
    stem = f"{source}_{name}"
    path = FOLDER / f"{stem}.py"
    if path.exists():
        raise run.UsageError("name", name, f"one without a file {path}")
    text = (FOLDER / f"{source}.py").read_text(encoding="utf-8")
    if re.search(rf"\b{name}_(weight|loss)\b", text):
        raise run.UsageError(
            "name", name, f"one whose {name}_weight and {name}_loss are not in {source}.py yet"
        )
    run.write_atomically(with_method(text, source, name, next_note()).encode(), path)
    print(STEPS.format(path=path, stem=stem, name=name))


if __name__ == "__main__":
    run.main(main, Args)
