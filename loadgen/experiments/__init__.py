"""The paper's figures and claims, sweeps, comparisons with live runs, and the fit of the `paper` profile.

Start with `figures`. Imports `loadgen.sim` and `loadgen.replay`; only `deploy` imports it.
"""
