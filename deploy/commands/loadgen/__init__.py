"""`deepar loadgen ...`: one module a command."""
