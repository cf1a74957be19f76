"""The runtime (LiteRT), and the trial run of an untrusted model in a child process.

Start with `litert`, the only module that imports the runtime. The wing imports `bus` and `stages.models.files`.
"""
