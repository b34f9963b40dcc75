"""Packages that an option needs and that not every installation has."""

from importlib.util import find_spec

from clo.runtime.wire.errors import ConfigError


def need(option: str, extra: str, packages: dict[str, str]) -> None:
    """See that the packages of an extra are there, without importing them.

    Args:
        option: what needs them.
        packages: by module.

    Raises:
        ConfigError: one is missing.
    """
    for module, package in packages.items():
        if not _is_there(module):
            raise ConfigError(
                f"{option} needs the package '{package}', which is not installed; run "
                f"\"pip install 'clo-llm[{extra}]'\", or \"pip install -e '.[{extra}]'\" in a clone."
            )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of is missing
        return False
