"""Modules on a device, their kernels, and launches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cumla.sim.arguments import marshal
from cumla.sim.errors import LaunchError
from cumla.sim.grid import Grid, Launch
from cumla.sim.isa.table import Env
from cumla.sim.memory import DeviceArray
from cumla.sim.program.inline import flatten
from cumla.sim.program.prepare import Prepared, look_up, prepare, refuse
from cumla.sim.ptx.syntax import Function, Module, Variable
from cumla.sim.register_pool import at_start
from cumla.sim.wave import Geometry

if TYPE_CHECKING:
    from cumla.sim.device import Device

CHECKS = frozenset({"memory", "race"})
DELIVERIES = ("eager", "late", "random")
# A wave has at most so many lanes: 128 KiB a register keeps the arrays of a block's
# instructions in a core's second-level cache, but blocks that wait for each other must fit.
WAVE_LANES = 1 << 17
# And at most so many bytes of shared memory and registers.
WAVE_BYTES = 1 << 30
# CUDA C Programming Guide "Thread Block Clusters": 8 is portable, Hopper allows 16.
MAX_CLUSTER = 16
FIRST_CLUSTERS = 90


class LoadedModule:
    """A PTX module on a device, with its variables in the device's memory."""

    def __init__(self, device: Device, module: Module) -> None:
        self.device = device
        self.module = module
        entries = [f for f in module.functions.values() if f.entry and f.body]
        self.specific = module.target.endswith(("a", "f"))
        # Only to find out now, not while it runs, what cannot be run.
        env = Env(device.capability, specific=self.specific)
        problems = {entry.name: look_up(flatten(module, entry), env)[1] for entry in entries}
        if any(problems.values()):
            raise refuse(problems)
        self.variables: dict[str, DeviceArray] = {}
        placed = [v for v in module.variables.values() if v.space in ("global", "const")]
        for variable in placed:
            self.variables[variable.name] = device.memory.alloc(
                max(variable.size, 1),
                np.uint8,
                name=variable.name,
                read_only=variable.space == "const",
            )
        for variable in placed:
            self._initialise(variable)
        self.kernels: dict[str, Kernel] = {e.name: Kernel(self, e) for e in entries}

    def _initialise(self, variable: Variable) -> None:
        array = self.variables[variable.name]
        data = bytearray((variable.initial or b"").ljust(array.nbytes, b"\0"))
        for offset, width, symbol, addend, _ in variable.addresses:
            # Global and constant addresses are their own generic addresses.
            value = self.variables[symbol].address + addend
            data[offset : offset + width] = value.to_bytes(8, "little")[:width]
        array.set(np.frombuffer(bytes(data), np.uint8))

    def kernel(self, name: str) -> Kernel:
        """A kernel by its name in the PTX, or by its C++ name if only one kernel has that."""
        if name in self.kernels:
            return self.kernels[name]
        # An Itanium-mangled name holds the length of the function's name and the name.
        alike = [k for k in self.kernels if k.startswith("_Z") and f"{len(name)}{name}" in k]
        if len(alike) == 1:
            return self.kernels[alike[0]]
        raise LaunchError(
            f"kernel: got {name!r}; the module has {', '.join(self.kernels) or 'no kernel'}"
        )

    def variable(self, name: str) -> DeviceArray:
        """The bytes of a `__device__` or `__constant__` variable."""
        if name not in self.variables:
            raise LaunchError(f"variable: got {name!r}; the module has {', '.join(self.variables)}")
        return self.variables[name]

    @property
    def addresses(self) -> Mapping[str, int]:
        """Where its variables lie."""
        return {name: array.address for name, array in self.variables.items()}


class Kernel:
    """A kernel of a loaded module."""

    def __init__(self, owner: LoadedModule, entry: Function) -> None:
        self.owner = owner
        self.entry = entry
        self.name = entry.name
        self._prepared: dict[Env, Prepared] = {}

    def prepare(self, env: Env) -> Prepared:
        """Its code for a set of options, generated once."""
        if env not in self._prepared:
            self._prepared[env] = prepare(self.owner.module, self.entry, env, self.owner.addresses)
        return self._prepared[env]

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] = (),
        *,
        shared_bytes: int = 0,
        checks: Collection[str] = ("memory",),
        counters: bool = False,
        delivery: str = "eager",
        seed: int = 0,
        wave_blocks: int | None = None,
        cluster: int | Sequence[int] | None = None,
    ) -> Launch:
        """Run the kernel to its end.

        Args:
            grid, block: numbers of blocks and threads, an int or up to three of them.
            args: one value for each parameter: a device array (its address is passed), a NumPy
                scalar, a Python number, a tensor map (`tensor_map`), or raw bytes for another
                struct passed by value.
            shared_bytes: dynamic shared memory of a block.
            checks: of "memory" (bounds, alignment, freed, read-only and unwritten bytes) and
                "race".
            counters: count instructions, traffic and conflicts; see `Launch.counters`.
            delivery: when asynchronous copies land: "eager" at once, "late" only where the
                program has waited for them, "random" in between, by the seed.
            seed: of the order in which blocks start, and of random delivery.
            wave_blocks: how many blocks run at a time; by default what the device could hold. The
                blocks of a cluster always run together.
            cluster: blocks of a cluster, an int or up to three of them; by default what the
                kernel's .reqnctapercluster says, or 1.

        Returns:
            Launch, with printed text (also written to standard output) and counters.

        Raises:
            LaunchError: for arguments that cannot be; nothing has run.
            MemoryFault, RaceError, Deadlock, KernelTrap, KernelAssert: what the kernel did.
        """
        return self.configure(
            grid,
            block,
            args,
            shared_bytes=shared_bytes,
            checks=checks,
            counters=counters,
            delivery=delivery,
            seed=seed,
            wave_blocks=wave_blocks,
            cluster=cluster,
        ).run()

    def configure(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] = (),
        *,
        shared_bytes: int = 0,
        checks: Collection[str] = ("memory",),
        counters: bool = False,
        delivery: str = "eager",
        seed: int = 0,
        wave_blocks: int | None = None,
        cluster: int | Sequence[int] | None = None,
    ) -> Grid:
        """A launch that has not begun; arguments and LaunchError as for `launch`."""
        device = self.owner.device
        grid3, block3 = dimensions("grid", grid), dimensions("block", block)
        unknown = set(checks) - CHECKS
        if unknown:
            raise LaunchError(f"checks: got {sorted(unknown)}; known are {sorted(CHECKS)}")
        if delivery not in DELIVERIES:
            raise LaunchError(f"delivery: got {delivery!r}; choose one of {', '.join(DELIVERIES)}")
        cluster3, explicit = self.cluster_dimensions(cluster, grid3)
        env = Env(
            device.capability,
            "memory" in checks,
            "race" in checks,
            counters,
            delivery,
            cluster=cluster3 != (1, 1, 1),
            specific=self.owner.specific,
        )
        prepared = self.prepare(env)
        layout = prepared.layout
        params = marshal(self.name, self.entry.parameters, args, layout.param_size)
        self.check_block(block3, layout.shared_size, shared_bytes)
        geometry = Geometry(
            self.name,
            grid3,
            block3,
            layout.shared_size + shared_bytes,
            shared_bytes,
            [(n, at, size or shared_bytes) for n, at, size in layout.shared],
            layout.local_size,
            layout.local_params,
            params,
            layout.shared_start,
            cluster3,
            explicit,
            at_start(self.entry.directives),
        )
        rng = np.random.default_rng(seed)
        clusters = rng.permutation(geometry.blocks // geometry.cluster_size)
        order = geometry.cluster_blocks(clusters)
        size = self.wave_size(prepared, geometry) if wave_blocks is None else wave_blocks
        if size < 1:
            raise LaunchError(f"wave_blocks: got {wave_blocks}; at least one block must run")
        size = max(size // geometry.cluster_size, 1) * geometry.cluster_size
        return Grid(device, prepared, geometry, env, order, size, rng, keep=(self, args))

    def check_block(self, block: tuple[int, int, int], static: int, dynamic: int) -> None:
        """Refuse a block that the device or the kernel's directives do not allow."""
        threads = block[0] * block[1] * block[2]
        if threads > 1024 or block[2] > 64:
            raise LaunchError(
                f"block: got {block}, {threads} threads; at most 1024, and 64 along z"
            )
        most = self.entry.directives.get("maxntid")
        if most is not None and threads > int(np.prod(most)):
            raise LaunchError(f"block: got {block}; .maxntid of {self.name} allows {most}")
        exact = self.entry.directives.get("reqntid")
        if exact is not None and block != (*exact, 1, 1)[:3]:
            raise LaunchError(f"block: got {block}; .reqntid of {self.name} is {exact}")
        limit = self.owner.device.shared_per_block
        if dynamic < 0 or static + dynamic > limit:
            raise LaunchError(
                f"shared_bytes: got {dynamic}, beside {static} static bytes; a block of "
                f"{self.owner.device.target} has at most {limit}"
            )

    def cluster_dimensions(
        self, given: int | Sequence[int] | None, grid: tuple[int, int, int]
    ) -> tuple[tuple[int, int, int], bool]:
        """Blocks of a cluster, and whether launch or kernel say so, checked.

        PTX ISA "Cluster Dimension Directives"; CUDA C Programming Guide "Thread Block Clusters".
        """
        required = self.entry.directives.get("reqnctapercluster")
        asked = None if given is None else dimensions("cluster", given)
        if required:
            fixed = dimensions("reqnctapercluster", required)
            if asked not in (None, fixed):
                raise LaunchError(
                    f"cluster: got {asked}; .reqnctapercluster of {self.name} is {fixed}"
                )
            asked = fixed
        if asked is None:
            if "explicitcluster" in self.entry.directives:
                raise LaunchError(
                    f"cluster: got None; {self.name} is .explicitcluster: say how many blocks"
                )
            return (1, 1, 1), False
        size = int(np.prod(asked))
        if size > 1 and self.owner.device.capability < FIRST_CLUSTERS:
            raise LaunchError(
                f"cluster: got {asked}; {self.owner.device.target} has no clusters, which came "
                f"with sm_{FIRST_CLUSTERS}"
            )
        (largest,) = self.entry.directives.get("maxclusterrank") or (MAX_CLUSTER,)
        if size > largest:
            raise LaunchError(f"cluster: got {asked}, {size} blocks; at most {largest} are allowed")
        if any(n % k for n, k in zip(grid, asked, strict=True)):
            raise LaunchError(f"cluster: got {asked}; the grid {grid} must be multiples of that")
        return asked, True

    def wave_size(self, prepared: Prepared, geometry: Geometry) -> int:
        """How many blocks run at a time: what the device holds, bounded by our own memory."""
        fits = self.owner.device.resident_blocks(geometry.lanes, geometry.shared_size)
        a_block = geometry.shared_stride * 2 + geometry.lanes * (
            8 * len(prepared.kernel.registers) + 2 * geometry.local_size
        )
        return max(1, min(fits, WAVE_LANES // geometry.lanes, WAVE_BYTES // a_block))


def dimensions(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """Three numbers of a grid or a block."""
    given = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    if not 1 <= len(given) <= 3 or any(int(n) != n or n < 1 for n in given):
        raise LaunchError(f"{name}: got {value!r}; one to three positive integers")
    x, y, z = (*(int(n) for n in given), 1, 1)[:3]
    if name == "grid" and (x >= 1 << 31 or y > 65535 or z > 65535):
        raise LaunchError(f"grid: got {given}; at most 2^31 - 1, 65535 and 65535 blocks")
    return x, y, z
