"""Start a CLO server: ``python launch.py --workers 1 --kvstore numa0``."""

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

from clo.runtime.config import (
    Attention,
    CacheConfig,
    Device,
    DType,
    LoadFormat,
    LogLevel,
    ModelConfig,
    Prefetch,
    Profile,
    ServerConfig,
    format_size,
    parse_size,
)
from clo.runtime.machine.process import configure_logging
from clo.runtime.wire.errors import CLOError, ConfigError

DESCRIPTION = """\
Serve a long-context language model with its KV cache in CPU memory. The worker keeps a small index
of all keys and, for each KV head, the rows that the head attends to; missing rows come from CPU
memory. No size is reduced in silence: what does not fit is an error."""

EPILOG = """\
what to set:
  --select-k, --resident and --gate trade exactness against memory and transfers. The defaults keep
  many more rows than one step selects, so that a row once fetched serves many steps. The cache of
  the paper (arXiv 2511.14510) has --resident equal to --select-k: it holds one selection and reuses
  it while the query stays close to the one that made it:
  --select-k 1024 --resident 1024 --gate 0.8

examples:
  python launch.py --workers 1 --kvstore numa0
  python launch.py --model ./Llama-3.1-8B-Instruct --dtype bfloat16 --kv-size 64GiB
  python launch.py --workers 2 --kvstore numa0,numa1 --kv-size 128GiB   # 256 GiB in all

When the server accepts requests it prints one line:
  ready tcp://127.0.0.1:5555 model=NAME capacity=N tokens
Ctrl-C or SIGTERM stops it and all its processes; a second one does so at once. The exit code is 0
after such a stop, 2 for a wrong option, and 1 when the server could not start or a process of it
died."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=28)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see 'python launch.py --help'.")


def number_or(word: str, number: Callable[[str], Any], text: str) -> Any:
    """None for ``word``, which names the absence of a limit, else the number."""
    if text == word:
        return None
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor '{word}'") from None


def parser() -> Parser:
    model, cache, server = ModelConfig(), CacheConfig(), ServerConfig()
    root = Parser(
        prog="launch.py",
        usage="python launch.py [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )

    def choice(group: argparse._ArgumentGroup, option: str, kind: Any, default: str, text: str) -> None:
        group.add_argument(option, choices=get_args(kind), default=default, help=f"{text} (%(default)s)")

    group = root.add_argument_group("model")
    group.add_argument(
        "--model",
        default=model.model,
        metavar="NAME",
        help="a folder in the Hugging Face layout, or the name of the built-in default (%(default)s)",
    )
    choice(
        group,
        "--load-format",
        LoadFormat,
        model.load_format,
        "auto reads the weights; dummy takes random ones of the same shape, to measure speed",
    )
    choice(group, "--device", Device, model.device, "auto takes the GPUs where there are any")
    choice(group, "--dtype", DType, model.dtype, "of weights and KV cache; auto takes the model's own")
    group.add_argument(
        "--max-model-len",
        type=partial(number_or, "auto", int),
        default="auto",
        metavar="TOKENS",
        help="longest prompt plus output of one request; auto takes the model's own limit (%(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=model.seed,
        metavar="N",
        help="of random weights and of requests that bring none (%(default)s)",
    )

    group = root.add_argument_group("cache")
    group.add_argument(
        "--kv-size",
        type=parse_size,
        default=format_size(server.kv_bytes).replace(" ", ""),
        metavar="SIZE",
        help="CPU memory of ONE KV store, in total over all layers and workers that use it: 512MiB, 8GiB; "
        "bounds the tokens that can be served at once (%(default)s)",
    )
    choice(
        group,
        "--attention",
        Attention,
        cache.attention,
        "clo keeps rows over many steps; topk fetches its selection anew in every step; full attends to "
        "all rows, exact and slow, to compare with",
    )
    group.add_argument(
        "--select-k",
        type=partial(number_or, "auto", int),
        default="auto",
        metavar="ROWS",
        help="rows that a KV head selects at a time: more is closer to full attention and moves more; auto "
        "takes 128, and 256 where --max-model-len exceeds 8192 (%(default)s)",
    )
    group.add_argument(
        "--resident",
        type=partial(number_or, "auto", int),
        default="auto",
        metavar="ROWS",
        help="rows that a KV head keeps on the worker and attends to, at least --select-k: more is closer to "
        "full attention, fetches less and takes more memory for each request; auto takes 8 times --select-k "
        "(%(default)s)",
    )
    group.add_argument(
        "--gate",
        type=partial(number_or, "off", float),
        default="off" if cache.gate is None else str(cache.gate),
        metavar="COSINE",
        help="a head keeps its rows while its query is at least this close to the query that selected them: "
        "lower selects less often and is less exact; off selects in every step (%(default)s)",
    )
    group.add_argument(
        "--profile",
        default="off",
        metavar="FILE",
        help="what each layer selects and keeps, and a gate for each KV head, as benchmarks.calibrate finds "
        "them for a model; in place of --select-k, --resident and --gate (%(default)s)",
    )
    choice(
        group,
        "--prefetch",
        Prefetch,
        cache.prefetch,
        "fetch for a layer while the one before computes, with a predicted query, in all layers where that "
        "predicts well: correct selects again with the real one, accept does not, which is fastest",
    )
    group.add_argument(
        "--drift-check",
        type=partial(number_or, "off", int),
        default="off",
        metavar="STEPS",
        help="compare a step of each request with full attention once in so many, and report it with the "
        "statistics; the other requests wait meanwhile (%(default)s)",
    )

    group = root.add_argument_group("server")
    group.add_argument(
        "--host",
        default=server.host,
        metavar="ADDRESS",
        help="address for clients; anyone who reaches it may use the server (%(default)s)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=server.port,
        metavar="PORT",
        help="0 takes a free one; the ready line names it (%(default)s)",
    )
    choice(group, "--log-level", LogLevel, server.log_level, "of all processes, on stderr")

    group = root.add_argument_group("processes")
    group.add_argument(
        "--workers",
        type=int,
        default=server.workers,
        metavar="N",
        help="worker processes, one for each GPU; each holds the whole model (%(default)s)",
    )
    group.add_argument(
        "--kvstore",
        default=",".join(server.stores),
        metavar="NODES",
        help="KV stores, one for each NUMA node named: numa0 or numa0,numa1; a worker uses the store nearest "
        "to it (%(default)s)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=server.max_num_seqs,
        metavar="N",
        help="requests that one worker decodes together: more is a higher throughput and takes more memory "
        "on the worker (%(default)s)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=server.gpu_memory_utilization,
        metavar="SHARE",
        help="of each GPU's memory that may be used, weights included (%(default)s)",
    )
    return root


def config_from(argv: list[str]) -> ServerConfig:
    """Raises ``ConfigError`` where an option is unknown or its value is wrong."""
    options = parser().parse_args(argv)
    return ServerConfig(
        model=ModelConfig(
            model=options.model,
            load_format=options.load_format,
            dtype=options.dtype,
            device=options.device,
            max_model_len=options.max_model_len,
            seed=options.seed,
        ),
        cache=CacheConfig(
            attention=options.attention,
            select_k=options.select_k,
            resident=options.resident,
            gate=options.gate,
            prefetch=options.prefetch,
            profile=None if options.profile == "off" else Profile.load(Path(options.profile)),
            drift_check=options.drift_check,
        ),
        workers=options.workers,
        stores=tuple(options.kvstore.split(",")),
        kv_bytes=options.kv_size,
        max_num_seqs=options.max_num_seqs,
        gpu_memory_utilization=options.gpu_memory_utilization,
        host=options.host,
        port=options.port,
        log_level=options.log_level,
    )


def main(argv: list[str]) -> int:
    if sys.platform != "linux":
        print(f"error: CLO runs on Linux only, and this is {sys.platform}.", file=sys.stderr)
        return 1
    try:
        config = config_from(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    configure_logging(config.log_level)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the supervisor takes both signals over
    try:
        from clo.runtime.supervisor import supervise  # takes seconds; an answer to a wrong option should not

        return supervise(config)
    except CLOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
