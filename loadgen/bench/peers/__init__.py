"""Programs that serve a model with other software, for the serving benchmark.

Another Python runs them, in which that software is installed; DeePar imports none of them.
"""
