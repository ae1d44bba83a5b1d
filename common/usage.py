"""What `--help` of an algorithm says: its settings in groups, with default, the task's preset, range and meaning.

All of it stands in the file's Args already. A comment line in the body of the class opens a group, or goes on with one;
settings above the first are the run's. The comment behind a setting says what it means.
"""

import inspect
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

KINDS = {int: "INT", float: "NUMBER", str: "NAME", Path: "PATH"}
DEFAULTS_AT = 44  # column


def groups(args_type: type) -> dict[str, dict[str, str]]:
    """Group -> setting -> comment, in the order of the class."""
    found, group, known = {}, "run", args_type.__dataclass_fields__
    for line in inspect.getsource(args_type).split("\n"):
        if m := re.match(r"    # (.+)$", line):
            group = m[1]
        elif (m := re.match(r"    (\w+): .*?(?:  # (.*))?$", line)) and m[1] in known:
            found.setdefault(group, {})[m[1]] = m[2] or ""
    return found


def flag_of(name: str, hint: Any) -> str:
    """The flag and what it takes: `--device {auto,cpu,cuda}`, `--lr NUMBER in (0, inf)`, `--wandb, --no-wandb`."""
    flag, limits = name.replace("_", "-"), getattr(hint, "__metadata__", ())
    options = [x for x in get_args(hint) if x is not NoneType]
    if get_origin(hint) is Literal:
        return f"--{flag} {{{','.join(options)}}}"
    kind = options[0] if options else hint
    if kind is bool:
        return f"--{flag}, --no-{flag}"
    return " in ".join((f"--{flag} {KINDS[kind]}", *limits))


def shown(value: Any) -> str:
    """A value as it may be typed; switches are on or off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    form = {int: "_", float: "g"}.get(type(value))
    return "none" if value is None else format(value, form) if form else str(value)


def help_text(preset: Any) -> str:
    """The whole text; `preset` are the settings of a task before any flag (run.with_presets). Raises UsageError."""
    args_type, env = type(preset), preset.env
    module, hints = sys.modules[args_type.__module__], get_type_hints(args_type, include_extras=True)
    if "/" not in env:  # a Minari id would be fetched
        module.data.get_task(env)  # is there such a task?
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    wrap = partial(fill, width=width, break_long_words=False, break_on_hyphens=False)
    paragraph = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    guide = (
        f"Each flag with its default, and behind that what {env} takes instead (--env NAME --help: another task). In "
        "[ ] is the source of a number, D1 or U1 is a note in the docstring of the file, which also tells of metrics, "
        "cost and known failures. NEW is what this method adds to its backbone."
    )
    file = "/".join(Path(module.__file__).parts[-2:])
    usage = f"usage: python {file} [--env NAME] [--seed INT] [more settings]"
    lines = [usage, "", wrap(re.match(r".*?\.(?= |$)|.*", paragraph)[0]), "", wrap(guide)]
    needs = {name: x for x, names in getattr(module, "NEEDS", {}).items() for name in names}
    indent = dict(initial_indent=" " * 6, subsequent_indent=" " * 6)
    for group, settings in groups(args_type).items():
        lines += ["", group]
        for name, comment in settings.items():
            default, here = args_type.__dataclass_fields__[name].default, getattr(preset, name)
            values = f"default {shown(default)}"
            if here != default and name != "env":
                values += f"; {env}: {shown(here)}"
            flag = f"  {flag_of(name, hints[name])}"
            one_line = f"{flag:<{DEFAULTS_AT - 2}}  {values}"
            lines += [one_line] if len(one_line) <= width else [flag, " " * 6 + values]
            comment += f"; only if {needs[name]}" if name in needs else ""
            lines += [wrap(comment, **indent)] if comment else []
    return "\n".join(lines)
