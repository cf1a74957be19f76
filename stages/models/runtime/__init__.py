"""The runtime (LiteRT), and the trial run of an unknown model in a process of its own.

Start with `litert`, the one module that imports the runtime. Imports `bus` and `stages.models.files`.
"""
