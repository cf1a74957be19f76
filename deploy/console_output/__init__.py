"""How commands print and draw: tables, charts, progress, shared options, and checks of output paths.

The commands may import it.
"""
