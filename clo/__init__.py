"""CLO: long-context language models on GPUs whose memory is too small for the KV cache."""

from importlib.metadata import version

from clo.runtime.client import AsyncClient, Client

__version__ = version("clo-llm")
__all__ = ["AsyncClient", "Client", "__version__"]
