"""What the programs of `pallas_kernels` share: flags, mistakes in them, and versions of what is installed."""

import importlib.metadata
import sys
from collections.abc import Iterable
from typing import NoReturn

from absl import app, flags


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; a flag that is wrong ends the program with one message."""
    if {"--help", "-help", "-h"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(f"{error} See --help.")


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
