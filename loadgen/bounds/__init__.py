"""Lower bounds of the mean delay: what no policy can beat on given tasks (`deepar simulate bound`).

Start with `distance`; `fluid_bound` and `exact_optimum` compute the two bounds. Imports `loadgen.sim` and
`loadgen.experiments`; only `deploy` imports it.
"""
