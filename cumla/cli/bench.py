"""`cumla bench OP`: time one op on random data."""

from __future__ import annotations

import json
import statistics
import textwrap
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np

import cumla
from cumla.backends import BackendUnavailable, get_backend, load_backend
from cumla.backends.numpy.parallel import num_threads
from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.cli import workloads
from cumla.cli.workloads import DTYPE_NAMED, LAYOUT_NAMED, Work
from cumla.fp8 import SCALE_RULES
from cumla.layouts import BF16, V4_FP8, V32_FP8, KVLayout

_WARM_UPS = 2
_WIDTH = 100


@click.group("bench", short_help="Time one op.")
def command() -> None:
    """Time one op on random data: min, median and max over some calls, and the rates they make.

    GFLOP/s counts 2 (d_qk + d_v) for every head, query and token, in decoding whether masked or
    not, and 2 (3 d_qk + 2 d_v) for gradients. GB/s counts each byte that is used or written once,
    lse aside; MB/s of pack-kv and unpack-kv the decoded rows, on one thread. All of the median.
    Results are not looked at: that is what `cumla smoke` does.

    Example:  cumla bench sparse-decode --batch 4 --topk 1024
    """


def _count(name: str, default: int, text: str, low: int = 1) -> click.Option:
    return click.Option(
        [name], type=click.IntRange(min=low), default=default, show_default=True, help=text
    )


def _choice(
    name: str,
    values: list[str],
    default: str | None,
    text: str,
    convert: Callable[[str], Any] | None = None,
) -> click.Option:
    return click.Option(
        [name],
        type=click.Choice(values),
        default=default,
        show_default=True,
        help=text,
        callback=(lambda context, option, value: convert(value)) if convert else None,
    )


def _batch() -> click.Option:
    return _count("--batch", 8, "Requests.")


def _s_q(default: int = 1) -> click.Option:
    return _count("--s-q", default, "Query tokens of each request.")


def _h_q(default: int = 128) -> click.Option:
    return _count("--h-q", default, "Query heads.")


def _seq_len() -> click.Option:
    return _count("--seq-len", 4096, "KV tokens of each request.")


def _topk() -> click.Option:
    return _count("--topk", 2048, "Tokens that each query selects.")


def _page_size() -> click.Option:
    return _count("--page-size", 64, "Tokens in a page.")


def _dtype() -> click.Option:
    return _choice("--dtype", list(DTYPE_NAMED), "bf16", "Of the inputs.")


def _layout(default: KVLayout, names: list[str]) -> click.Option:
    return _choice("--layout", names, default.name, "KV format.")


def _scale_rule() -> click.Option:
    text = "How FP8 tiles get their scales.  [default: the layout's]"
    return _choice("--scale-rule", list(SCALE_RULES), None, text)


def _usage_error(error: Exception, values: dict[str, Any]) -> click.UsageError:
    """What cumla refused, as an error of the option that it came from, where that can be told."""
    argument, _, reason = str(error).partition(": ")
    if argument in values:
        return click.BadParameter(reason, param_hint=f"'{_flag(argument)}'")
    return click.UsageError(str(error))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _time(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls."""
    for _ in range(_WARM_UPS):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _result(op: str, values: dict[str, Any], work: Work, times: list[float]) -> dict[str, Any]:
    """The JSON object: the op, all its parameters, where it ran, the times and the rates."""
    median = statistics.median(times)
    rate = work.bytes / median / 1e6
    result: dict[str, Any] = {"op": op, **values}
    # The codecs work in the calling thread whatever CUMLA_NUM_THREADS says.
    threads = 1 if work.flop is None else num_threads()
    result |= {"cumla": cumla.__version__, "numpy": np.__version__}
    result |= {"backend": get_backend(), "threads": threads}
    result |= {"times_ms": times, "min_ms": min(times), "median_ms": median, "max_ms": max(times)}
    result |= {"bytes": work.bytes, "gb_per_s": rate}
    result |= {"flop": work.flop}
    result |= {"gflop_per_s": None if work.flop is None else work.flop / median / 1e6}
    return result


def _report(result: dict[str, Any]) -> str:
    """`result` for a person."""
    after = list(result).index("cumla")
    values = [f"{_flag(name)[2:]} {value}" for name, value in list(result.items())[1:after]]
    plural = "s" if result["threads"] > 1 else ""
    times = "  ".join(f"{name} {result[f'{name}_ms']:.3f}" for name in ("min", "median", "max"))
    lines = [
        ("op", result["op"]),
        ("with", ", ".join(one for one in values if not one.endswith("None"))),
        ("on", f"{result['backend']} backend, {result['threads']} thread{plural}"),
        ("ms", f"{times}  (of {len(result['times_ms'])})"),
    ]
    if result["gflop_per_s"] is None:
        lines.append(("MB/s", f"{result['gb_per_s'] * 1e3:.0f} of decoded rows per core"))
    else:
        lines.append(("GFLOP/s", f"{result['gflop_per_s']:.1f}"))
        lines.append(("GB/s", f"{result['gb_per_s']:.2f}"))
    return "\n".join(
        textwrap.fill(f"{name:<7}  {value}", _WIDTH, subsequent_indent=" " * 9)
        for name, value in lines
    )


_ALL_LAYOUTS = list(LAYOUT_NAMED)


def _mha_options() -> list[click.Option]:
    return [
        _count("--batch", 1, "Sequences."),
        _h_q(16),
        _count("--h-kv", 16, "KV heads."),
        _count("--seq-len", 4096, "Tokens of each sequence, queries and keys."),
        _count("--d-qk", 192, "Width of q and k."),
        _count("--d-v", 128, "Width of v."),
        click.Option(
            ["--causal/--no-causal"], default=True, show_default=True, help="Mask later keys."
        ),
        _dtype(),
    ]


def _codec_options() -> list[click.Option]:
    return [_batch(), _seq_len(), _layout(V32_FP8, _ALL_LAYOUTS), _page_size(), _scale_rule()]


_OPS: dict[str, tuple[Callable[..., Work], list[click.Option]]] = {
    "dense-decode": (
        workloads.dense_decode,
        [
            _batch(),
            _s_q(),
            _h_q(),
            _count("--h-kv", 1, "KV heads."),
            _seq_len(),
            _layout(BF16, ["BF16", "FP16"]),
            _page_size(),
            click.Option(["--causal"], is_flag=True, help="Mask the later of the query tokens."),
        ],
    ),
    "sparse-decode": (
        workloads.sparse_decode,
        [
            _batch(),
            _s_q(),
            _h_q(),
            _seq_len(),
            _topk(),
            _layout(V32_FP8, _ALL_LAYOUTS),
            _page_size(),
            _scale_rule(),
        ],
    ),
    "sparse-prefill": (
        workloads.sparse_prefill,
        [
            _count("--s-q", 128, "Query tokens."),
            _h_q(),
            _count("--seq-len", 4096, "KV tokens."),
            _topk(),
            _choice(
                "--d-qk",
                [str(V32_FP8.d_qk), str(V4_FP8.d_qk)],
                str(V32_FP8.d_qk),
                "Width of q and of a KV row.",
                int,
            ),
            _dtype(),
        ],
    ),
    "mha-varlen": (workloads.mha_varlen, _mha_options()),
    "mha-varlen-backward": (workloads.mha_varlen_backward, _mha_options()),
    "pack-kv": (workloads.pack_kv, _codec_options()),
    "unpack-kv": (workloads.unpack_kv, _codec_options()),
}


def _subcommand(
    name: str, prepare: Callable[..., Work], options: list[click.Option]
) -> click.Command:
    """`cumla bench NAME`, which times what `prepare` makes of an rng and `options`."""

    def run(repeats: int, seed: int, as_json: bool, **values: Any) -> None:
        if "h_kv" in values and values["h_q"] % values["h_kv"]:
            raise click.BadParameter(
                f"{values['h_q']} query heads are no multiple of --h-kv {values['h_kv']}.",
                param_hint="'--h-q'",
            )
        try:
            load_backend()
            num_threads()
            work = prepare(np.random.default_rng(seed), **values)
            times = _time(work.call, repeats)
        except (ArgumentError, ArgumentTypeError) as error:
            raise _usage_error(error, values) from error
        except MemoryError as error:
            raise click.ClickException(f"{error} Pass a smaller --batch or --seq-len.") from error
        except BackendUnavailable as error:
            raise click.ClickException(str(error)) from error
        values = {option.name: values[option.name] for option in options if option.name}
        result = _result(name, values | {"repeats": repeats, "seed": seed}, work, times)
        click.echo(json.dumps(result) if as_json else _report(result))

    return click.Command(
        name,
        callback=run,
        help=f"{prepare.__doc__}\n\nExample:  cumla bench {name} --repeats 3 --json",
        short_help=prepare.__doc__,
        params=[
            *options,
            _count("--repeats", 5, f"Timed calls, after {_WARM_UPS} that are not."),
            _count("--seed", 0, "Of the random data.", low=0),
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
        ],
    )


for _name, (_prepare, _options) in _OPS.items():
    command.add_command(_subcommand(_name, _prepare, _options))
