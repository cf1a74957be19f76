"""The device's side of the stages: attempts at its tasks, and the requests and sessions of applications in its process.

Start with `device`. It imports the modules of `stages` and the wings `measuring` and `network`; `stages.serving`, `loadgen`
and `deploy` may import it.
"""
