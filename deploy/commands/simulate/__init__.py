"""`deepar simulate ...`: one module a command."""
