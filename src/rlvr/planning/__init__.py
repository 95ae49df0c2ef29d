"""What a run would take: memory by part and seconds by phase, from shapes and sizes alone."""

from rlvr.planning.fit import warnings
from rlvr.planning.hardware import GIB, Hardware, this_cpu
from rlvr.planning.job import EngineSizes, Job
from rlvr.planning.memory import PHASES, Part, concurrent_rows, memory, peaks, plain_logits
from rlvr.planning.seconds import seconds
from rlvr.planning.shapes import Shapes, shapes_of

__all__ = [
    "GIB",
    "PHASES",
    "EngineSizes",
    "Hardware",
    "Job",
    "Part",
    "Shapes",
    "concurrent_rows",
    "memory",
    "peaks",
    "plain_logits",
    "seconds",
    "shapes_of",
    "this_cpu",
    "warnings",
]
