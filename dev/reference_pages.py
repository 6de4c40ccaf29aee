"""Write the reference pages that come from the code: ``--help``, settings and the Python reference.

    python dev/reference_pages.py           # writes docs/reference/{topt-deploy,topt-run,settings,python}.md
    python dev/reference_pages.py --check   # writes nothing; exit code 1 if a page is stale

The pages are part of the repository, so that they can be read without building the site. A test runs the check.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import click
import griffe

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
MADE = "<!-- Made by dev/reference_pages.py (make docs); do not edit. -->"
HELP_WIDTH, SIGNATURE_WIDTH = 92, 80
PUBLIC = ("topt_deploy", "topt_deploy.errors")
"""The public modules. Their public names are those of ``__all__``, or else all classes that they define."""


# ---------------------------------------------------------------------------------------------- commands


def programs() -> dict[str, click.Group]:
    """The programs that pyproject.toml installs, by name."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    modules = {name: importlib.import_module(entry.partition(":")[0]) for name, entry in scripts.items()}
    for name, module in modules.items():
        if not hasattr(module, "cli"):  # a package, which has its group beside the entry point
            modules[name] = importlib.import_module(f"{module.__name__}.group")
    return {name: module.cli for name, module in modules.items()}


def commands(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[str, click.Context]]:
    """A command and, if it is a group, all commands in it: the full name, and a context for its help."""
    context = click.Context(
        command, parent=parent, info_name=name, max_content_width=HELP_WIDTH, terminal_width=HELP_WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    yield context.command_path, context
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from commands(found, each, context)


def help_page(name: str, group: click.Group) -> str:
    """The page of a program: what ``--help`` prints, command by command."""
    parts = [MADE, f"# {name}", f"What `{name} --help`, and `--help` of each of its commands, prints."]
    for command, context in commands(group, name):
        heading = [] if command == name else [f"## {command}"]
        parts += [*heading, f"```text\n{context.get_help()}\n```"]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """The settings as tables: name, values, default of each preset, meaning."""
    from topt_deploy.config import settings as config
    from topt_deploy.config.load import load_config
    from topt_deploy.config.load import presets as preset_names

    presets = {name: load_config(preset=name, tasks=["crime"]) for name in preset_names()}
    first = config.DEFAULT_PRESET
    parts = [
        MADE,
        "# Settings",
        "[Train and change settings](../how-to/train.md) says where settings are written. A setting of a section, such "
        "as `[srel]`, holds for every task. In `[tasks.NAME.srel]` it holds for one task.",
        f"The column *default* is the value in the preset `{first}`. Values of other presets are given where they "
        "differ, for the task `crime`.",
        _settings_table("At the top of the file", config.Config, {n: c for n, c in presets.items()}, skip={"tasks"}),
    ]
    for field in dataclasses.fields(config.TaskConfig):
        kind = get_type_hints(config.TaskConfig)[field.name]
        values = {name: getattr(preset.tasks["crime"], field.name) for name, preset in presets.items()}
        parts.append(_settings_table(f"`[{field.name}]`", kind, values))
    return "\n\n".join(parts) + "\n"


def _settings_table(title: str, kind: Any, values: dict[str, Any], skip: set[str] = frozenset()) -> str:
    from topt_deploy.config.settings import DEFAULT_PRESET

    text, meanings = _documented(kind)
    hints = get_type_hints(kind, include_extras=True)
    rows = []
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        default = getattr(values[DEFAULT_PRESET], field.name)
        others = {n: getattr(v, field.name) for n, v in values.items() if n not in (DEFAULT_PRESET, "quick")}
        differ = "; ".join(f"{n}: `{_toml(v)}`" for n, v in others.items() if v != default and field.name != "preset")
        meaning = meanings[field.name] + (f" ({differ})" if differ else "")
        rows.append(f"| `{field.name}` | {_values(hints[field.name])} | `{_toml(default)}` | {meaning} |")
    table = "\n".join(["| setting | values | default | meaning |", "|---|---|---|---|", *rows])
    return f"## {title}\n\n{text}\n\n{table}"


def _documented(kind: Any) -> tuple[str, dict[str, str]]:
    """A class's first sentence, and the text of each of its attributes; one entry may describe several."""
    parsed = griffe.Docstring(inspect.getdoc(kind) or "").parse("google", warnings=False)
    text = " ".join(str(section.value) for section in parsed if section.kind is griffe.DocstringSectionKind.text)
    meanings: dict[str, str] = {}
    for line in _attribute_lines(inspect.getdoc(kind) or ""):
        names, _, meaning = line.partition(": ")
        for name in names.split(", "):
            meanings[name] = _markdown(meaning)
    return _markdown(" ".join(text.split())), meanings


def _attribute_lines(docstring: str) -> list[str]:
    """The entries below ``Attributes:``, each as one line."""
    _, _, below = docstring.partition("Attributes:\n")
    entries: list[str] = []
    for line in below.splitlines():
        if line.startswith(" " * 5) and entries:
            entries[-1] += f" {line.strip()}"
        elif line.strip():
            entries.append(line.strip())
    return entries


def _values(hint: Any) -> str:
    bounds = ""
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)
        bounds = f" ≥ {allowed.low:g}" + (f" and < {allowed.high:g}" if allowed.high != float("inf") else "")
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return {float: "list of numbers", str: "list of names"}[get_args(hint)[0]]
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[hint] + bounds


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------- Python


def public_objects() -> Iterator[tuple[str, griffe.Object]]:
    """Every public object, under the first name by which it is imported. Sources are read, not imported."""
    seen: set[int] = set()
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module_name]
        classes = [value.__name__ for value in own if inspect.isclass(value) and not value.__name__.startswith("_")]
        listed = [name for name in getattr(module, "__all__", classes) if not name.startswith("_")]
        for name in listed:
            value = inspect.unwrap(getattr(module, name))
            if id(value) in seen:
                continue
            seen.add(id(value))
            file = Path(inspect.getsourcefile(value) or "")
            source = griffe.visit(value.__module__, filepath=file, code=file.read_text(encoding="utf-8"))
            yield f"{module_name}.{name}", source[value.__qualname__]


def python_page() -> str:
    """Every public name with its signature and docstring."""
    parts = [
        MADE,
        "# Python",
        "The names on this page are public: they change only with a note in the [changelog](../../CHANGELOG.md). "
        "[Use it from Python](../how-to/python.md) shows them at work.",
    ]
    for name, found in public_objects():
        parts += [f"## {name}", *_described(found)]
        for member in public_members(found):
            parts += [f"### {found.name}.{member.name}", *_described(member)]
    return "\n\n".join(parts) + "\n"


def public_members(found: griffe.Object) -> list[griffe.Object]:
    """The public methods and properties of a class."""
    if not found.is_class:
        return []
    members = [member for name, member in found.members.items() if not name.startswith("_")]
    return [member for member in members if member.is_function or (member.is_attribute and "property" in member.labels)]


def _described(found: griffe.Object) -> list[str]:
    code = _signature(found)
    parts = [f"```python\n{code}\n```"] if code else []
    if found.docstring is None:
        return parts
    for section in found.docstring.parse("google", warnings=False):
        match section.kind:
            case griffe.DocstringSectionKind.text:
                parts.append(_markdown(section.value))
            case griffe.DocstringSectionKind.parameters | griffe.DocstringSectionKind.attributes:
                rows = [f"| `{entry.name}` | {_cell(entry.description)} |" for entry in section.value]
                title = section.kind.value.removesuffix("s").capitalize()
                parts.append("\n".join([f"| {title} | |", "|---|---|", *rows]))
            case griffe.DocstringSectionKind.raises:
                rows = [
                    f"| `{str(entry.annotation).strip('()')}` | {_cell(entry.description)} |" for entry in section.value
                ]
                parts.append("\n".join(["| Raises | |", "|---|---|", *rows]))
            case griffe.DocstringSectionKind.returns | griffe.DocstringSectionKind.yields:
                texts = [_cell(entry.description) for entry in section.value]
                parts.append(f"**{section.kind.value.capitalize()}:** {' '.join(texts)}")
            case griffe.DocstringSectionKind.examples:
                parts += [f"```python\n{text}\n```" for _, text in section.value]
            case griffe.DocstringSectionKind.admonition:
                parts.append(f"**{section.title}:** {_cell(section.value.contents)}")
    return parts


def _signature(found: griffe.Object) -> str:
    if found.is_class:
        init = found.members.get("__init__")
        bases = ", ".join(str(base) for base in found.bases)
        head = f"class {found.name}" + (f"({bases})" if bases else "")
        own = _parameters(init) if init is not None and init.is_function else []
        return head if not own or bases else _wrapped(f"class {found.name}", own, "")
    if found.is_function:
        return _wrapped(found.name, _parameters(found), f" -> {found.returns}" if found.returns else "")
    annotation = getattr(found, "annotation", None)
    return f"{found.name}: {annotation}" if annotation else ""


def _wrapped(head: str, parameters: list[str], tail: str) -> str:
    text = f"{head}({', '.join(parameters)}){tail}"
    return (
        text
        if len(text) <= SIGNATURE_WIDTH
        else f"{head}(\n    {(chr(10) + '    ').join(f'{p},' for p in parameters)}\n){tail}"
    )


def _parameters(function: Any) -> list[str]:
    shown, keyword_only = [], False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind
        if kind is griffe.ParameterKind.keyword_only and not keyword_only:
            keyword_only = True
            shown.append("*")
        star = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        keyword_only |= star == "*"
        text = f"{star}{parameter.name}" + (f": {parameter.annotation}" if parameter.annotation else "")
        has_default = parameter.default is not None and not star
        shown.append(text + (f" = {parameter.default}" if has_default else ""))
    return shown


def _cell(text: str) -> str:
    return _markdown(" ".join(text.split())).replace("|", "\\|")


def _markdown(text: str) -> str:
    """Docstrings' double backticks, roles and names of pages as Markdown."""
    text = re.sub(r":\w+:`~?\.*([^`]+)`", r"`\1`", text)
    text = re.sub(r"\bdocs/([\w/-]+)\.md", r"[\1](../\1.md)", text)
    return text.replace("``", "`")


# ---------------------------------------------------------------------------------------------- all of it


def pages() -> dict[Path, str]:
    """Every generated page, by its file."""
    helps = {REFERENCE / f"{name}.md": help_page(name, group) for name, group in programs().items()}
    return helps | {REFERENCE / "settings.md": settings_page(), REFERENCE / "python.md": python_page()}


def stale() -> list[Path]:
    """The pages that are not what the code says."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is stale")
    if parser.parse_args().check:
        found = stale()
        for path in found:
            print(f"stale: {path.relative_to(ROOT)}; run: make docs", file=sys.stderr)
        return 1 if found else 0
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
