"""Which cases prove an op, which are timed, and when two results count as equal: read by tests and benchmarks."""

from .compare import backends, compare, devices, sum_bound, wanted
from .quantizer import SEED, STREAM, arrange, row_index
from .table import (
    EDGES,
    FLOATS,
    GRANULARITIES,
    GROUP,
    INTEGERS,
    LISTS,
    MEMORIES,
    OPS,
    OPTIONS,
    SHAPE,
    TIMED,
    Case,
    Op,
    cases,
    model_of_list,
    timed,
)
