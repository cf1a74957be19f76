"""The defaults of the client. Imports nothing, so that the command line can show them at once."""

from __future__ import annotations

DEFAULT_URL = "http://127.0.0.1:8600"
"""The endpoint of a device on this machine."""
DEFAULT_TIMEOUT_S = 60.0
"""Time limit of a request."""
