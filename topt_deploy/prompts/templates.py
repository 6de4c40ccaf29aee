"""The texts and questions for a language model: the shipped templates.toml, and a user's own file on top of it."""

import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from topt_deploy.config.load import _NAME, _read_toml
from topt_deploy.config.settings import RESERVED_TASKS
from topt_deploy.errors import BadConfig, UsageError
from topt_deploy.storage.hashed_file import sha256_bytes

_PLACES = {
    "heading": set(),
    "coordinates": {"lat", "lon"},
    "address": {"address"},
    "poi": {"count", "category", "share"},
    "pois": {"pois", "total"},
    "no_pois": set(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The lines of a geo-text, with ``{names}`` for what is filled in.

    Attributes:
        heading: The first line.
        coordinates: Of ``lat`` and ``lon``.
        address: Of ``address``.
        poi: One category: ``count``, ``category`` and ``share``.
        pois: All categories, as ``pois``, and their ``total``.
        no_pois: Where none was counted.
    """

    heading: str
    coordinates: str
    address: str
    poi: str
    pois: str
    no_pois: str


@dataclass(frozen=True, kw_only=True)
class Templates:
    """Everything of a prompt that is not the region's.

    Attributes:
        version: The templates' own.
        wording: Of the geo-text.
        questions: By task, "" for none.
    """

    version: str
    wording: Wording
    questions: Mapping[str, str]

    def question(self, task: str) -> str:
        """A task's question.

        Raises:
            UsageError: If there is no such task.
        """
        if task not in self.questions:
            raise UsageError(
                f"no template for task {task!r}",
                expected=f"one of {', '.join(self.questions)}",
                fix=f"add [tasks.{task}] with a question to a templates file of your own",
            )
        return self.questions[task]

    def sha256(self, task: str) -> str:
        """The hash of all that makes a task's prompt: version, wording and question."""
        return _sha256({"version": self.version, "geo_text": asdict(self.wording), "question": self.question(task)})

    @cached_property
    def whole_sha256(self) -> str:
        """The hash of all templates."""
        return _sha256(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the file's form, which :meth:`from_dict` reads back."""
        tasks = {task: {"question": question} for task, question in self.questions.items()}
        return {"version": self.version, "geo_text": asdict(self.wording), "tasks": tasks}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: object = "templates") -> "Templates":
        """Check and take plain values.

        Raises:
            BadConfig: Naming the key.
        """
        _known(values, ("version", "geo_text", "tasks"), "", where)
        wording = _table(values, "geo_text", where)
        _known(wording, tuple(_PLACES), "geo_text.", where)
        questions = {}
        for task, entry in _table(values, "tasks", where).items():
            if not _NAME.match(task) or task in RESERVED_TASKS:
                expected = "letters, digits and _, and no column of the contract"
                raise BadConfig("no name for a task", file=where, column=f"tasks.{task}", expected=expected)
            if not isinstance(entry, Mapping):
                raise BadConfig("not a table", file=where, column=f"tasks.{task}", expected="a question", found=entry)
            _known(entry, ("question",), f"tasks.{task}.", where)
            questions[task] = _text(entry, "question", f"tasks.{task}.", where).strip()
        version = _text(values, "version", "", where)
        lines = {line.name: _line(wording, line.name, where) for line in fields(Wording)}
        return cls(version=version, wording=Wording(**lines), questions=questions)


def load_templates(file: Path | None = None) -> Templates:
    """The shipped templates, and on top of them those of ``file``, whose entries win.

    Raises:
        BadConfig: If the file is no TOML, or a key is unknown or of the wrong form.
        NoInput: If there is no such file.
    """
    shipped = resources.files("topt_deploy.prompts") / "templates.toml"
    values = _read_toml(shipped.read_text, shipped)
    if file is None:
        return Templates.from_dict(values, shipped)
    own = _read_toml(file.read_text, file)
    merged = {
        section: values[section] | _table(own, section, file) for section in ("geo_text", "tasks") if section in own
    }
    return Templates.from_dict(values | own | merged, file)


def _sha256(values: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(values, sort_keys=True).encode())


def _known(values: Mapping[str, Any], keys: tuple[str, ...], place: str, where: object) -> None:
    for key in values:
        if key not in keys:
            raise BadConfig(f"unknown key {place + key!r}", file=where, expected=f"one of {', '.join(keys)}")


def _table(values: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    found = values.get(key)
    if not isinstance(found, Mapping):
        raise BadConfig("not a table", file=where, column=key, expected=f"[{key}]", found=repr(found))
    return found


def _text(values: Mapping[str, Any], key: str, place: str, where: object) -> str:
    found = values.get(key)
    if not isinstance(found, str):
        raise BadConfig("not a text", file=where, column=place + key, expected="a string", found=repr(found))
    return found


def _line(wording: Mapping[str, Any], key: str, where: object) -> str:
    line, column = _text(wording, key, "geo_text.", where), f"geo_text.{key}"
    places = _PLACES[key]
    expected = f"only {', '.join(f'{{{p}}}' for p in sorted(places)) or 'plain text'}; a brace itself is doubled"
    try:
        found = [(name, form, how) for _, name, form, how in string.Formatter().parse(line) if name is not None]
    except ValueError as error:
        raise BadConfig(f"not a line to fill in ({error})", file=where, column=column, expected=expected) from error
    for name, form, how in found:
        if name not in places or form or how:
            raise BadConfig("nothing to fill in there", file=where, column=column, expected=expected, found=repr(line))
    return line
