"""The page that `deepar ui` serves: a server, and static files that need no build step."""

from deploy.monitor.ui.server import serve

__all__ = ["serve"]
