"""Start a CLO server: ``python launch.py --workers 1 --kvstore numa0``."""

import argparse
import os
import signal
import sys
from dataclasses import Field, fields
from functools import partial
from typing import Any, NoReturn, get_args

DESCRIPTION = """\
Serve a long-context language model with its KV cache in CPU memory. The worker keeps a small index
of all keys and, for each KV head, the rows that the head attends to; missing rows come from CPU
memory. A size that was asked for is never reduced: what does not fit is an error."""

EPILOG = """\
what to set:
  --select-k, --resident, --tail and --gate trade exactness against memory and transfers. The
  defaults keep many more rows than one step selects, so that a row once fetched serves many
  steps. The cache of the paper (arXiv 2511.14510) has --resident equal to --select-k: it holds one
  selection and reuses it while the query stays close to the one that made it:
  --select-k 1024 --resident 1024 --tail 0 --gate 0.8

examples:
  python launch.py --workers 1 --kvstore numa0
  python launch.py --model ./Llama-3.1-8B-Instruct --dtype bfloat16 --kv-size 64GiB
  python launch.py --workers 2 --kvstore numa0,numa1 --kv-size 128GiB   # 256 GiB in all
  python launch.py --http 8000   # OpenAI's API at http://127.0.0.1:8000/v1, too

When the server accepts requests it prints one line, whose last word is there with --http:
  ready tcp://127.0.0.1:5555 model=NAME capacity=N tokens http://127.0.0.1:8000
Ctrl-C or SIGTERM stops it and all its processes; a second one does so at once. The exit code is 0
after such a stop, 2 for a wrong option, and 1 when the server could not start or a process of it
died that was not to be started again."""


def _without_package(error: ModuleNotFoundError) -> str:
    """The sentence for a package that this Python has not got; ``error`` itself where it is one of CLO's."""
    if error.name is None or error.name.partition(".")[0] == "clo":
        raise error
    return (
        f"error: {sys.executable} has no package '{error.name}'; run 'make setup' once and start with "
        ".venv/bin/python, or install CLO there with 'pip install -e .'."
    )


try:
    from clo.runtime.config import CacheConfig, EngineConfig, GatewayConfig, ModelConfig, Option, ServerConfig
    from clo.runtime.machine.process import (
        configure_logging,
        keep_torch_out,
        raise_descriptor_limit,
        set_threads,
    )
    from clo.runtime.wire.errors import CLOError, ConfigError
except ModuleNotFoundError as error:
    sys.exit(_without_package(error))

GROUPS = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "worker": EngineConfig,
    "server": ServerConfig,
    "HTTP": GatewayConfig,
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=28)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.usage and self.usage.partition(' [')[0]} --help'.")


def _value(option: Option, text: str) -> Any:
    """The value of an option, None for the word that names the absence of one."""
    assert option.parse is not None, "it is a choice"
    if option.none and text == option.none:
        return None
    try:
        return option.parse(text)
    except ConfigError as error:
        if str(error).startswith("--"):
            raise
        # argparse puts the option's name before it
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        also = f" or '{option.none}'" if option.none else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not a number{also}") from None


def _options(config: type) -> list[tuple[Field[Any], Option]]:
    """The fields of a configuration class that are options."""
    return [(field, field.metadata["option"]) for field in fields(config) if "option" in field.metadata]


def parser(command: str) -> Parser:
    """The options of all configuration classes.

    Args:
        command: how the program was called, for its help.
    """
    root = Parser(
        prog=command,
        usage=f"{command} [options]",
        description=DESCRIPTION,
        epilog=EPILOG.replace("python launch.py", command),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    for title, config in GROUPS.items():
        group = root.add_argument_group(title)
        for field, option in _options(config):
            name = "--" + field.name.replace("_", "-")
            if option.parse is None:
                text = f"{option.help} ({field.default})"
                group.add_argument(name, choices=get_args(field.type), default=field.default, help=text)
                continue
            shown = option.default_text or (option.none if field.default is None else field.default)
            group.add_argument(
                name,
                type=partial(_value, option),
                default=field.default,
                metavar=option.metavar,
                help=f"{option.help} ({shown})",
            )
    return root


def config_from(argv: list[str], command: str = "python launch.py") -> ServerConfig:
    """Raises ``ConfigError`` where an option is unknown or its value is wrong."""
    given = vars(parser(command).parse_args(argv))
    values = {
        config: {field.name: given[field.name] for field, _ in _options(config)} for config in GROUPS.values()
    }
    if values[ServerConfig]["api_key"] is None:
        values[ServerConfig]["api_key"] = os.environ.get("CLO_API_KEY") or None
    return ServerConfig(
        model=ModelConfig(**values[ModelConfig]),
        cache=CacheConfig(**values[CacheConfig]),
        engine=EngineConfig(**values[EngineConfig]),
        gateway=GatewayConfig(**values[GatewayConfig]),
        **values[ServerConfig],
    )


def _open_standard_streams() -> None:
    """Give descriptors 0, 1 and 2, where they are closed, to /dev/null. A socket or an arena would get them
    else, and what processes print would go there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main(argv: list[str], command: str = "python launch.py", worker: str = "clo.gpu_worker") -> int:
    """Run a server to its end; returns the exit code.

    Args:
        argv: the options.
        command: how the program was called, for its help.
        worker: module that each worker runs; benchmarks have one of their own.
    """
    _open_standard_streams()
    if sys.platform != "linux":
        print(f"error: CLO runs on Linux only, and this is {sys.platform}.", file=sys.stderr)
        return 1
    try:
        config = config_from(argv, command)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    configure_logging(config.log_level)
    set_threads(os.environ)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the supervisor takes both signals over
    try:
        raise_descriptor_limit()
        try:
            keep_torch_out()
            # It takes a second, and an answer to a wrong option should not.
            from clo.runtime.supervisor import supervise
        except ModuleNotFoundError as error:
            print(_without_package(error), file=sys.stderr)
            return 1
        return supervise(config, worker)
    except CLOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
