"""Data races: accesses to the same bytes, not both reads, that nothing orders."""

from cumla.sim.race.detector import RaceDetector
from cumla.sim.race.report import Access, Race

__all__ = ["Access", "Race", "RaceDetector"]
