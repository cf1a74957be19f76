"""Scripts that use DeePar's endpoint through public clients, unchanged. They run in an environment of those clients.

Each takes the addresses of an endpoint and a folder with the cases, and prints what it compared, as JSON. They import
nothing of ours but `cases`.
"""
