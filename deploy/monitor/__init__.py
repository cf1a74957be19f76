"""The state of a region, folded from its topics into a view that `deepar top`, `ui`, `tail` and `explain` show.

Start with `region_view`. The commands may import it.
"""
