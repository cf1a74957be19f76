"""`MemoryBus`: the bus port inside one process. The embedded default, and the bus of the simulator.

Start with `bus`. Imports `bus` only; any room may import it.
"""
