"""`cumla sim`: run CUDA kernels on the CPU with checks, and look at what they did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np

from cumla import sim
from cumla.jit import nvrtc
from cumla.sim.profile import page

DTYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64,
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
}  # fmt: skip
ARRAY = re.compile(r"(\w+)\[([\d,x ]+)\](?:=(.+))?")
SCALAR = re.compile(r"(\w+):(.+)")
SHOWN = 8

EXAMPLE = """
\b
Example:
  cat > scale.cu <<'END'
  extern "C" __global__ void scale(float* x, float by, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i <= n) x[i] *= by;  // one too many
  }
  END
  cumla sim run scale.cu --kernel scale --grid 5 --block 256 \\
      --arg 'f32[1024]=arange' --arg f32:2 --arg 1024 --check memory,race
"""


@click.group(
    short_help="Run CUDA kernels on the CPU, with checks and counters.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Run CUDA kernels on the CPU, with memory, race and deadlock checks and exact counters.

    A simulation for finding bugs before a kernel meets a GPU; its counts are exact, but it knows
    no times.
    """


def parse_array(text: str, seed: int) -> Any:
    """A NumPy array for an argument like `f32[64,64]=arange`, or None if it is not an array."""
    match = ARRAY.fullmatch(text)
    if match is None:
        return None
    name, dims, fill = match.groups()
    if name not in DTYPES:
        raise click.BadParameter(f"{text!r}: type {name!r}; known are {', '.join(DTYPES)}")
    shape = tuple(int(n) for n in re.split(r"[,x ]+", dims.strip()))
    dtype = np.dtype(DTYPES[name])
    random = np.random.default_rng(seed)
    if fill is None or fill == "random":
        if dtype.kind in "iu":
            return random.integers(0, 100, shape).astype(dtype)
        return random.standard_normal(shape).astype(dtype)
    if fill == "arange":
        return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    try:
        return np.full(shape, float(fill) if dtype.kind not in "iu" else int(fill)).astype(dtype)
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: fill with a number, arange, random (the default) or unwritten"
        ) from None


def parse_argument(number: int, text: str, device: sim.Device, seed: int) -> Any:
    """A kernel argument: an array on the device, a scalar, or a number."""
    name = f"arg {number}"
    if text.endswith("]=unwritten"):
        shaped = parse_array(text.removesuffix("=unwritten") + "=0", seed)
        if shaped is not None:
            return device.alloc(shaped.shape, shaped.dtype, name=name)
    array = parse_array(text, seed)
    if array is not None:
        return device.upload(array, name=name)
    if text.endswith(".npy"):
        return device.upload(np.load(text), name=name)
    match = SCALAR.fullmatch(text)
    try:
        if match is not None and match[1] in DTYPES:
            dtype = np.dtype(DTYPES[match[1]])
            if dtype.kind in "iu":
                return dtype.type(int(match[2], 0))
            return np.array(float(match[2])).astype(dtype)[()]
        try:
            return int(text, 0)
        except ValueError:
            return float(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: give f32[1024], f32[64,64]=arange, s32[8]=0, u8[99]=unwritten, data.npy, "
            "a number, or a typed number such as u64:5"
        ) from None


def parse_size(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in re.split(r"[,x]", text))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give one to three numbers, e.g. 4 or 8,2") from None


@command.command(epilog=EXAMPLE)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kernel", required=True, help="Name of the kernel.")
@click.option("--grid", default="1", show_default=True, help="Blocks, e.g. 4 or 8,2.")
@click.option("--block", default="32", show_default=True, help="Threads of a block.")
@click.option("--arg", "args", multiple=True, help="An argument of the kernel, in order.")
@click.option("--cluster", help="Blocks of a cluster, e.g. 2 or 2,1.")
@click.option("--shared", default=0, help="Bytes of dynamic shared memory.")
@click.option("--target", default="sm_90a", show_default=True, help="GPU to compile for.")
@click.option("--check", default="memory,race", show_default=True, help="Checks, or none.")
@click.option("--delivery", type=click.Choice(["eager", "late", "random"]), default="eager",
              show_default=True, help="When asynchronous copies land.")  # fmt: skip
@click.option("--seed", default=0, help="Of block order, random arguments and random delivery.")
@click.option("-D", "defines", multiple=True, help="Define a macro.")
@click.option("-I", "includes", multiple=True, help="Add a folder for includes.")
@click.option("--counters", is_flag=True, help="Print counts for each source line.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Save the counts.")
@click.option("--profile", type=click.Path(path_type=Path), help="Save an HTML page of the counts.")
def run(
    file: Path,
    kernel: str,
    grid: str,
    block: str,
    args: tuple[str, ...],
    cluster: str | None,
    shared: int,
    target: str,
    check: str,
    delivery: str,
    seed: int,
    defines: tuple[str, ...],
    includes: tuple[str, ...],
    counters: bool,
    json_file: Path | None,
    profile: Path | None,
) -> None:
    """Compile FILE (CUDA C, or PTX if it ends in .ptx) and run one kernel on the CPU.

    Arguments (--arg) are numbers; typed numbers like f32:2; arrays like f32[1024],
    s32[64,64]=arange, u8[99]=0 or f32[9]=unwritten (random if no fill is given); or .npy files.
    """
    source = file.read_text()
    checks = () if check in ("", "none") else tuple(check.split(","))
    try:
        if file.suffix == ".ptx":
            ptx = source
        else:
            options = ["-lineinfo", "--std=c++17", *(f"-D{d}" for d in defines)]
            ptx = nvrtc.compile_to_ptx(
                source, str(file), target, [*options, *(f"-I{i}" for i in includes)]
            )
        device = sim.Device(target)
        module = device.load(ptx)
        values = [parse_argument(i, a, device, seed + i) for i, a in enumerate(args)]
        before = [v.get() if isinstance(v, sim.DeviceArray) else None for v in values]
        launch = module.kernel(kernel).launch(
            parse_size(grid),
            parse_size(block),
            values,
            shared_bytes=shared,
            checks=checks,
            counters=counters or json_file is not None or profile is not None,
            delivery=delivery,
            seed=seed,
            cluster=None if cluster is None else parse_size(cluster),
        )
    except (sim.SimError, nvrtc.CompileError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for number, (text, value, old) in enumerate(zip(args, values, before, strict=True)):
        if old is not None:
            new = value.get()
            changed = new.tobytes() != old.tobytes()
            listed = " ".join(str(x) for x in new.reshape(-1)[:SHOWN])
            more = " ..." if new.size > SHOWN else ""
            state = "changed" if changed else "unchanged"
            click.echo(f"arg {number} {text}: {state}: {listed}{more}")
    click.echo(f"{kernel}: no errors found (checks: {', '.join(checks) or 'none'})")
    if launch.counters is None:
        return
    if counters:
        click.echo(launch.counters.table())
    data = launch.counters.to_json()
    if json_file is not None:
        json_file.write_text(data)
    if profile is not None:
        profile.write_text(page(json.loads(data), {str(file): source}))
        click.echo(f"wrote {profile}")


@command.command()
@click.argument("counts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--source", "sources", multiple=True, help="A source file to show; repeatable.",
              type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("-o", "--output", default="profile.html", show_default=True, help="The page.",
              type=click.Path(dir_okay=False, path_type=Path))  # fmt: skip
def profile(counts: Path, sources: tuple[Path, ...], output: Path) -> None:
    """Render COUNTS, saved by `cumla sim run --json`, as an HTML page of the CUDA source.

    \b
    Example:
      cumla sim profile counts.json --source scale.cu -o profile.html
    """
    try:
        data = json.loads(counts.read_text())
        text = page(data, {str(s): s.read_text() for s in sources})
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(
            f"{counts}: not counts of `cumla sim run --json` ({error!r})"
        ) from error
    output.write_text(text)
    click.echo(f"wrote {output}")
