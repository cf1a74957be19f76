"""The regret benchmark (`deepar loadgen bench regret`): the planner's choices and those of fixed policies, live.

`deploy.commands.loadgen.regret` starts the processes; `regret` has the cells and the results, `rounds` plays them.
`deploy` may import it.
"""
