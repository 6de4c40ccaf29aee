"""Settings from TOML files, presets and overrides, checked."""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from topt_deploy.errors import BadConfig
from topt_deploy.storage.os_errors import reading

from .settings import (
    DEFAULT_PRESET,
    RESERVED_TASKS,
    RESERVED_VIEWS,
    Bounds,
    Config,
    EnsembleConfig,
    Prompt4ReConfig,
    SrelConfig,
    TargetConfig,
    TaskConfig,
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def presets() -> list[str]:
    """Names of the shipped presets."""
    return sorted(f.name.removesuffix(".toml") for f in _presets().iterdir() if f.name.endswith(".toml"))


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    tasks: Iterable[str] = (),
    overrides: Iterable[str] = (),
) -> Config:
    """Assemble a configuration: preset, then file, then ``KEY=VALUE`` overrides.

    Args:
        preset: A shipped preset; else the file's own ``preset``, else the default one.
        file: A TOML file.
        tasks: Train these tasks; by default those that the file lists, or else the preset's. A name that neither
            knows gets the common settings.
        overrides: Such as ``prompt4re.epochs=100`` (all tasks) or ``tasks.crime.srel.lr=1e-3``.

    Raises:
        BadConfig: Naming the file, the key, and what is known.
    """
    overrides = tuple(overrides)
    own = {} if file is None else _read_toml(file.read_text, file)
    name = preset or own.get("preset") or DEFAULT_PRESET
    if name not in presets():
        raise BadConfig("no such preset", file=file, expected=f"one of {presets()}", found=repr(name))
    source = _presets() / f"{name}.toml"
    layers = [(f"preset {name}", _read_toml(source.read_text, source)), (str(file), own)]
    layers += [(f"--set {override}", _parse_override(override)) for override in overrides]
    merged: dict[str, Any] = {}
    for where, layer in layers:
        _check_layer(layer, where)
        _merge(merged, layer)
    merged["preset"] = name
    common = {section: merged.pop(section, {}) for section in _SECTIONS}
    specific = merged.pop("tasks", {})
    chosen = tuple(tasks) or tuple(own.get("tasks") or layers[0][1].get("tasks", ()))
    if not chosen:
        raise BadConfig("no task is named", file=file, fix="add a [tasks.NAME] section, or --task NAME")
    for override in overrides:
        section, _, rest = override.partition(".")
        task = rest.split(".")[0]
        if section == "tasks" and task not in chosen:
            raise BadConfig(f"task {task!r} is not trained", file=f"--set {override}", expected=f"one of {chosen}")
    built = {}
    for task in chosen:
        values = {section: common[section] | specific.get(task, {}).get(section, {}) for section in _SECTIONS}
        built[task] = _task(values, f"tasks.{task}")
    config: Config = _build(Config, merged | {"tasks": built}, "configuration")
    _check_names(config)
    return config


def config_from_dict(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """Settings from the plain values that :meth:`Config.as_dict` gave.

    Raises:
        BadConfig: If a key is unknown or a value is wrong; naming ``where``.
    """
    values = dict(values)
    tasks = {name: _task(task, f"{where}: tasks.{name}") for name, task in values.pop("tasks", {}).items()}
    config: Config = _build(Config, values | {"tasks": tasks}, where)
    return config


_SECTIONS: dict[str, Any] = {
    "srel": SrelConfig, "prompt4re": Prompt4ReConfig, "ensemble": EnsembleConfig,
    "target": TargetConfig,
}  # fmt: skip


def _presets() -> Any:
    return resources.files("topt_deploy.config") / "presets"


def _read_toml(read: Any, where: object) -> dict[str, Any]:
    try:
        with reading(Path(str(where))):
            return tomllib.loads(read(encoding="utf-8").removeprefix("\ufeff"))  # Windows' editors begin with one
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadConfig(f"not valid TOML ({error})", file=where) from error


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadConfig("not KEY=VALUE", file=f"--set {text}", expected="such as prompt4re.epochs=100")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = value  # a bare word: --set target.transform=sqrt
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _check_layer(layer: Mapping[str, Any], where: str) -> None:
    """Check names and types of one layer alone, so that a mistake is reported where it stands."""
    values = {key: value for key, value in layer.items() if key not in (*_SECTIONS, "tasks")}
    _build(Config, values, where, known=(*_SECTIONS, "tasks"))
    if "preset" in layer and where.startswith("--set"):
        raise BadConfig("the preset is chosen by --preset", file=where)
    tasks = _table(layer.get("tasks", {}), "tasks", where)
    groups = {"": {section: layer[section] for section in _SECTIONS if section in layer}} | dict(tasks)
    for task, sections in groups.items():
        place = f"{where}: tasks.{task}" if task else where
        for section, settings in _table(sections, f"tasks.{task}", where).items():
            if section not in _SECTIONS:
                raise BadConfig(f"unknown key {section!r}", file=place, expected=f"one of {', '.join(_SECTIONS)}")
            _build(_SECTIONS[section], _table(settings, section, place), f"{place}.{section}" if task else place)


def _table(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadConfig(f"{name!r} is a table of settings", file=where, expected=f"[{name}]", found=repr(value))
    return value


def _check_names(config: Config) -> None:
    """Views and tasks name columns, tensors and files: they must be plain, and apart from each other."""
    for task in config.tasks:
        if not _NAME.match(task):
            raise BadConfig("a task's name is made of letters, digits and _", found=repr(task))
        beside = {f"{other}_{end}" for other in config.tasks for end in ("lower", "upper", "folds")}
        if task in RESERVED_TASKS | beside | set(config.views) or task.startswith("prompt_"):
            raise BadConfig(
                f"{task!r} cannot be the name of a task: another column or input is called so",
                fix="rename the label column",
            )
    for view in config.views:
        if not _NAME.match(view) or view in RESERVED_VIEWS or config.views.count(view) > 1:
            raise BadConfig(
                "cannot be the name of a view", column="views", found=repr(view),
                expected=f"letters, digits and _, once, none of {', '.join(sorted(RESERVED_VIEWS))}",
            )  # fmt: skip
    if not config.views:
        raise BadConfig("no view is named", column="views", expected="at least one")
    known = {*config.views, *RESERVED_VIEWS, *EnsembleConfig().not_linear}  # a city need not have the default's
    for task, settings in config.tasks.items():
        if unknown := sorted({*settings.ensemble.not_linear} - known):
            raise BadConfig(
                "ensemble.not_linear: no such view", file=f"tasks.{task}", expected=f"among {', '.join(sorted(known))}",
                found=", ".join(unknown),
            )  # fmt: skip


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Merge ``layer`` into ``base``. A common value that comes later also overrides a task's earlier one."""
    for section in _SECTIONS:
        for task in base.get("tasks", {}).values():
            for key in layer.get(section, {}):
                task.get(section, {}).pop(key, None)
    _deep_update(base, layer)


def _deep_update(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping):
            _deep_update(base.setdefault(key, {}), value)
        else:
            base[key] = value


def _task(values: Mapping[str, Any], where: str) -> TaskConfig:
    sections = {name: _build(kind, values.get(name, {}), f"{where}.{name}") for name, kind in _SECTIONS.items()}
    task = TaskConfig(**sections)
    _check(task, where)
    return task


def _check(task: TaskConfig, where: str) -> None:
    if task.target.likelihood != "gaussian" and task.target.transform != "none":
        raise BadConfig(
            f"likelihood {task.target.likelihood!r} works on the counts themselves",
            file=where,
            expected="target.transform = 'none'",
            found=repr(task.target.transform),
        )
    attention = task.prompt4re.width or task.srel.width
    for name, width, heads in (
        ("srel", task.srel.width, task.srel.heads),
        ("prompt4re", attention, task.prompt4re.heads),
        ("prompt4re", task.prompt4re.value_width or attention, task.prompt4re.heads),
    ):
        if heads < 1 or width % heads:
            raise BadConfig(f"{name}: heads do not divide the width", file=where, found=f"{heads} heads, width {width}")
    parts = (task.ensemble.kernel, task.ensemble.network, task.ensemble.trees, task.ensemble.topt)
    if task.ensemble.enabled and not any(parts):
        raise BadConfig("ensemble: nothing takes part", file=where, expected="kernel, network, trees or topt")
    if not (task.ensemble.lengths and task.ensemble.position_lengths):
        raise BadConfig(
            "ensemble: a list of lengths is empty",
            file=where,
            expected="at least one of lengths and of position_lengths",
        )
    if task.ensemble.enabled and task.target.likelihood != "gaussian":
        raise BadConfig(
            "ensemble: only the squared error is supported", file=where, expected="target.likelihood = 'gaussian'"
        )
    if task.prompt4re.folds < 2:
        raise BadConfig("prompt4re.folds: at least 2 folds", file=where, found=task.prompt4re.folds)


def _build(cls: Any, values: Mapping[str, Any], where: str, known: Iterable[str] = ()) -> Any:
    """Build a dataclass from plain values, checking names and types; ``known`` names what else may stand there."""
    hints = get_type_hints(cls, include_extras=True)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            expected = f"one of {', '.join(sorted({*hints, *known}))}"
            raise BadConfig(f"unknown key {key!r}", file=where, expected=expected)
        checked[key] = _convert(value, hints[key], key, where)
    return cls(**checked)


def _convert(value: Any, kind: Any, key: str, where: str) -> Any:
    allowed = Bounds()
    if get_origin(kind) is Annotated:
        kind, allowed = get_args(kind)
    expected = getattr(kind, "__name__", str(kind))
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        expected = f"one of {', '.join(map(repr, get_args(kind)))}"
    elif kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool):
        if not allowed.low <= value < allowed.high:
            expected = f"a number ≥ {allowed.low:g}" + (f" and < {allowed.high:g}" if allowed.high < math.inf else "")
            raise BadConfig("out of range", file=where, column=key, expected=expected, found=value)
        return kind(value)
    elif kind in (bool, str) and type(value) is kind:
        return value
    elif get_origin(kind) is tuple:
        numbers = get_args(kind)[0] is float
        if isinstance(value, (list, tuple)) and all(
            type(v) in (int, float) and 0 < v < math.inf if numbers else isinstance(v, str) for v in value
        ):
            return tuple(value)
        expected = "a list of numbers above 0" if numbers else "a list of names"
    elif key == "tasks":
        return value
    raise BadConfig("wrong value", file=where, column=key, expected=expected, found=repr(value))
