"""A GPU on the CPU: runs PTX with NumPy and finds what a GPU would hide.

```python
from cumla import sim

device = sim.Device("sm_90a", num_sms=132)
module = device.load(ptx)
x = device.upload(array)
module.kernel("scale").launch(grid=4, block=256, args=[x, np.float32(2)], checks={"memory", "race"})
print(x.get())
```

This room knows PTX and memory and nothing of attention; it imports nothing else of cumla.
"""

from cumla.sim.device import Device, load
from cumla.sim.errors import (
    Deadlock,
    KernelAssert,
    KernelError,
    KernelTrap,
    LaunchError,
    MemoryFault,
    PTXSyntaxError,
    RaceError,
    SimError,
    UnsupportedPTX,
)
from cumla.sim.grid import Launch
from cumla.sim.memory import DeviceArray
from cumla.sim.module import Kernel, LoadedModule
from cumla.sim.stream import Stream
from cumla.sim.tensormap import TensorMap, TensorMapError, tensor_map

__all__ = [
    "Deadlock",
    "Device",
    "DeviceArray",
    "Kernel",
    "KernelAssert",
    "KernelError",
    "KernelTrap",
    "Launch",
    "LaunchError",
    "LoadedModule",
    "MemoryFault",
    "PTXSyntaxError",
    "RaceError",
    "SimError",
    "Stream",
    "TensorMap",
    "TensorMapError",
    "UnsupportedPTX",
    "load",
    "tensor_map",
]
