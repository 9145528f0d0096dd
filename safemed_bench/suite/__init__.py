"""YAML -> validated Suite -> Plan of cells and units. Imports no torch."""

from .conditions import Condition
from .loader import Override, dump_suite, find_suite, load_suite, load_suites, shipped_suites
from .plan import Cell, Chunk, Plan, PlannedUnit, build_plan
from .schema import ConditionSpec, DataSpec, GateRule, ModelSpec, RunSpec, Suite, ThreatSpec

__all__ = [
    "Cell",
    "Chunk",
    "Condition",
    "ConditionSpec",
    "DataSpec",
    "GateRule",
    "ModelSpec",
    "Override",
    "Plan",
    "PlannedUnit",
    "RunSpec",
    "Suite",
    "ThreatSpec",
    "build_plan",
    "dump_suite",
    "find_suite",
    "load_suite",
    "load_suites",
    "shipped_suites",
]
