"""Shared blocks must be identical in every algorithm file.  --fix rewrites the copies from the home file."""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

BEGIN = re.compile(r"^# --- shared: (?P<id>[a-z0-9_]+\.[a-z0-9_]+) ---$")
END = re.compile(r"^# --- end shared: (?P<id>[a-z0-9_.]+) ---$")
FREE = {"Args", "ENV_PRESETS", "losses", "update", "train"}  # these differ from file to file on purpose


def blocks(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Block id -> (first, last + 1) line of its body. Raises ValueError on a malformed marker."""
    found, open_id, start = {}, None, 0
    for i, line in enumerate(lines):
        if m := BEGIN.match(line):
            if open_id or m["id"] in found:
                raise ValueError(f"line {i + 1}: block {m['id']} nested or repeated")
            open_id, start = m["id"], i + 1
        elif m := END.match(line):
            if m["id"] != open_id:
                raise ValueError(f"line {i + 1}: end of {m['id']} without its begin")
            found[open_id], open_id = (start, i), None
        elif line.lstrip().startswith("# --- ") and "shared" in line:
            raise ValueError(f"line {i + 1}: marker not understood: {line}")
    if open_id:
        raise ValueError(f"block {open_id} is never closed")
    return found


def check(root: Path, fix: bool = False) -> list[str]:
    """Problems found, as 'file: text'. An empty list means the tree is consistent."""
    folder = root / "algorithms"
    text = {p.stem: p.read_text(encoding="utf-8").split("\n") for p in sorted(folder.glob("*.py"))}
    errors, users, names = [], defaultdict(set), defaultdict(dict)
    for stem, lines in text.items():
        try:
            for block in blocks(lines):
                users[block].add(stem)
        except ValueError as e:
            return [f"{stem}.py: {e}"]
    for block, stems in users.items():
        home = block.split(".")[0]
        if home not in stems:
            errors.append(f"{block}: no such block in its home {home}.py")
            continue
        if len(stems) == 1:
            errors.append(f"{block}: only {home}.py has it; remove the markers")
        first, last = blocks(text[home])[block]
        body = text[home][first:last]
        ast.parse("\n".join(body))  # whole top-level statements only
        for stem in sorted(stems - {home}):
            a, b = blocks(text[stem])[block]
            if text[stem][a:b] != body:
                errors.append(f"{stem}.py: {block} differs from {home}.py")
                if fix:
                    text[stem][a:b] = body
                    (folder / f"{stem}.py").write_text("\n".join(text[stem]), encoding="utf-8")
    for stem, lines in text.items():  # same name, different code: the drift nobody notices
        for node in ast.parse("\n".join(lines)).body:
            name = getattr(node, "name", None)
            if name and name not in FREE:
                names[name].setdefault(ast.dump(node), []).append(stem)
    for name, bodies in names.items():
        if len(bodies) > 1:
            errors.append(
                f"{name}: {len(bodies)} different bodies in {sorted(s for b in bodies.values() for s in b)}"
            )
    return errors


if __name__ == "__main__":
    problems = check(Path(__file__).parent.parent, fix="--fix" in sys.argv)
    print("\n".join(problems) or "shared blocks: ok")
    sys.exit(bool(problems))
