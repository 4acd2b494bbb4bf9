"""Where settings come from: a file, the environment, the command line. Does not know how any of them is used.

A setting is named `section.field`. It comes, weakest first, from its default, the TOML file (`[section]`
tables), the environment (`QUICKCHANGE_SECTION_FIELD`) and the command line. Only this module reads the
environment.
"""

import dataclasses
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from server.config import SECTIONS, ServerSettings
from server.sections import RangeError, Section, fields_of
from server.setting_values import converted

# Flags with a name of their own; every other setting is --field where no other section has that field.
FLAG_NAMES: Mapping[str, str] = {
    "base": "base.source",
    "store": "store.root",
    "store_max_bytes": "store.max_bytes",
    "store_reserve_bytes": "store.reserve_bytes",
    "store_cache": "store.cache",
    "store_refresh_s": "store.refresh_s",
    "host": "grpc.host",
    "port": "grpc.port",
    "metrics_host": "metrics.host",
    "metrics_port": "metrics.port",
    "tls_cert": "tls.cert",
    "tls_key": "tls.key",
    "tls_client_ca": "tls.client_ca",
}

# Variables that the server shares with the client, the cache and other programs, so they carry no section.
_SHARED_VARIABLES: Mapping[str, str] = {
    "QUICKCHANGE_CACHE": "base.cache_dir",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "telemetry.otlp_endpoint",
}


class SettingsError(Exception):
    """A setting is missing, unknown or out of its range; the message names it, its value and its source."""


class _Given(NamedTuple):
    value: object
    source: str


class Setting(NamedTuple):
    """What the command line needs to offer a setting as a flag."""

    path: str
    default: object
    help: str


def all_settings() -> Iterator[Setting]:
    """Every setting, in order; a required one has `dataclasses.MISSING` as default."""
    for section, cls in SECTIONS.items():
        defaults = _defaults_of(cls)
        for name, (_, about) in fields_of(cls).items():
            yield Setting(f"{section}.{name}", defaults[name], about.text)


def _defaults_of(section: type[Section]) -> dict[str, object]:
    items = dataclasses.fields(section)  # type: ignore[arg-type]  # every section is a dataclass
    return {item.name: item.default for item in items}


def settings_from(
    flags: Mapping[str, object], environ: Mapping[str, str], config_file: Path | None = None
) -> ServerSettings:
    """Reads all sources once and builds checked settings.

    Args:
        flags: by flag name with underscores ("metrics_port", "max_running_requests") or by path
            ("grpc.host"); None means that the flag was not given.
        environ: normally os.environ.
        config_file: a TOML file with one table per section.

    Raises:
        SettingsError: naming the setting, its value and its source.
    """
    given: dict[str, _Given] = {}
    if config_file is not None:
        given.update(_from_file(config_file))
    given.update(_from_environment(environ))
    given.update(_from_flags(flags))
    built = {section: _build(section, cls, given) for section, cls in SECTIONS.items()}
    return ServerSettings(**built)  # type: ignore[arg-type]  # SECTIONS and the fields of ServerSettings agree


def _build(section: str, cls: type[Section], given: Mapping[str, _Given]) -> Section:
    values: dict[str, object] = {}
    for name, default in _defaults_of(cls).items():
        path = f"{section}.{name}"
        if path in given:
            values[name] = _convert(path, fields_of(cls)[name][0], given[path])
        elif default is dataclasses.MISSING:
            ways = f"--{_flag_of(path)}, {_variable_of(path)} or {name} under [{section}]"
            raise SettingsError(f"{path} is not set: give {ways}")
    try:
        return cls(**values)
    except RangeError as error:
        path = f"{section}.{error.name}"
        source = given[path].source if path in given else "default"
        raise SettingsError(f"{section}.{error} ({source})") from None


def _from_file(config_file: Path) -> Iterator[tuple[str, _Given]]:
    try:
        document = tomllib.loads(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {config_file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {config_file}: is not TOML: {error}") from None
    known = {setting.path for setting in all_settings()}
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise SettingsError(
                f"[{section}] in {config_file}: no such section; there are {', '.join(SECTIONS)}"
            )
        for name, value in table.items():
            path = f"{section}.{name}"
            if path not in known:
                fields = ", ".join(sorted(p.split(".")[1] for p in known if p.startswith(f"{section}.")))
                raise SettingsError(
                    f"{path} = {value!r} in {config_file}: no such setting; [{section}] has {fields}"
                )
            yield path, _Given(value, str(config_file))


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, _Given]]:
    variables = {_variable_of(setting.path): setting.path for setting in all_settings()} | dict(
        _SHARED_VARIABLES
    )
    prefixes = tuple(f"QUICKCHANGE_{section.upper()}_" for section in SECTIONS)
    for variable, value in environ.items():
        if variable in variables:
            yield variables[variable], _Given(value, variable)
        elif variable.startswith(prefixes):  # a typo must not pass for the default
            raise SettingsError(f"{variable}={value}: no such setting; unset it or correct its name")


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, _Given]]:
    paths = _paths_by_flag()
    for flag, value in flags.items():
        if value is None:
            continue
        if flag not in paths:
            raise SettingsError(f"--{flag.replace('_', '-')}={value}: no such setting")
        yield paths[flag], _Given(value, f"--{_flag_of(paths[flag])}")


def _paths_by_flag() -> dict[str, str]:
    paths = [setting.path for setting in all_settings()]
    fields = Counter(path.split(".")[1] for path in paths)
    unique = {path.split(".")[1]: path for path in paths if fields[path.split(".")[1]] == 1}
    return unique | {path: path for path in paths} | dict(FLAG_NAMES)


def _variable_of(path: str) -> str:
    return "QUICKCHANGE_" + path.replace(".", "_").upper()


def _flag_of(path: str) -> str:
    short = {full: flag for flag, full in FLAG_NAMES.items()}
    return short.get(path, path.split(".")[1]).replace("_", "-")


def _convert(path: str, wanted: Any, given: _Given) -> object:
    """The value as the setting's type; strings come from the environment and the command line."""
    try:
        return converted(given.value, wanted)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path} is {given.value!r}, {error} ({given.source})") from None
