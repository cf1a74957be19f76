"""DeePar: device-edge-cloud inference. Cut a network after two layers, plan it, stream it over Kafka.

The package holds the client, the version and the program. The client depends on numpy and aiohttp only:

    import deepar
    with deepar.Client("http://127.0.0.1:8600") as client:
        answer = client.infer("lenet", picture)

`deepar` and `python -m deepar` are `deepar.__main__.main`. Importing the package imports only the standard library, so that
the program can say what is wrong with an installation before it uses it; the client is imported when it is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepar.client import AsyncClient, AsyncSession, Client, Session
    from deepar.protocol import Answer, InferenceError, InputError, ModelInfo, TensorInfo

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncSession",
    "Client",
    "InferenceError",
    "InputError",
    "ModelInfo",
    "Session",
    "TensorInfo",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deepar' has no attribute {name!r}")
    from deepar import client, protocol

    return getattr(client, name, None) or getattr(protocol, name)
