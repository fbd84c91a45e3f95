"""Memory of the simulated device: global, constant, shared, local and parameter memory."""

from cumla.sim.memory.device import DeviceArray, DeviceMemory
from cumla.sim.memory.wave import WaveMemory

__all__ = ["DeviceArray", "DeviceMemory", "WaveMemory"]
