"""CLO: long-context language models on GPUs whose memory is too small for the KV cache."""

from clo.runtime.client import AsyncClient, Client

__version__ = "0.2.0"
__all__ = ["AsyncClient", "Client", "__version__"]
