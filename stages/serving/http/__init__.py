"""The endpoint over HTTP: the paths and bodies of the protocol, streams over a WebSocket, and the server.

`server` needs aiohttp, so a process that does not serve must not import this wing. It imports `stages.serving`; `deploy` may
import it.
"""
