"""`quickchange serve`: settings from the command line, then the server. Does not know how they are used."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import MISUSED, CommandError, needs_extra
from quickchange.commands.options import add_command
from server.setting_sources import FLAG_NAMES, Setting, SettingsError, all_settings, settings_from

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange serve --base smollm2 --store ./store
  quickchange serve --base ./model --store ./store --port 0 --metrics-port 0
  quickchange serve --config server.toml --max-running-requests 64

every setting may also stand in the file, as FIELD in the table [SECTION], or in the environment, as
QUICKCHANGE_SECTION_FIELD; flags win over the environment, and the environment over the file."""

_SHORT = {path: flag for flag, path in FLAG_NAMES.items()}


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "serve", "run the server", _EXAMPLES)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with settings")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in all_settings():
        section, _, field = setting.path.partition(".")
        group = groups.get(section) or groups.setdefault(section, parser.add_argument_group(section))
        group.add_argument(
            f"--{_SHORT.get(setting.path, field).replace('_', '-')}",
            dest=setting.path,
            metavar="VALUE",
            help=_help(setting),
        )


def run(args: argparse.Namespace) -> int:
    flags = {setting.path: getattr(args, setting.path) for setting in all_settings()}
    try:
        settings = settings_from(flags, os.environ, args.config)
    except SettingsError as error:
        raise CommandError(str(error), MISUSED) from error
    if settings.engine.threads is not None:
        # OpenMP reads it once, when torch is imported.
        os.environ["OMP_NUM_THREADS"] = str(settings.engine.threads)
    with needs_extra("server"):
        from server.app import serve
    return serve(settings)


def _help(setting: Setting) -> str:
    if setting.default is dataclasses.MISSING:
        return f"{setting.help} (required)"
    return setting.help if setting.default is None else f"{setting.help} (default: {setting.default})"
