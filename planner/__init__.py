"""The planner room: where to cut, through which edge, with how much bandwidth, and whether to wait.

It imports `bus` only; `loadgen` and `deploy` import it. `core.PlannerCore` is the whole of it without I/O: events in, changes
out. Under it lie `cost` ((1)-(7)), `search` (the best cuts), `ledger` (what is reserved when), `algorithm` (Algorithm 1),
`policies`, `walk` (who may start now), `states` and `tasks`; around it `service`, which reads and writes the bus.
"""

from planner.core.core import PlannerCore, Tick
from planner.search.algorithm1 import Algorithm, Choice, EdgeOption, Request
from planner.search.policies import Policy, Restriction, load_policy, policy_names

__all__ = [
    "Algorithm",
    "Choice",
    "EdgeOption",
    "PlannerCore",
    "Policy",
    "Request",
    "Restriction",
    "Tick",
    "load_policy",
    "policy_names",
]
