"""What is measured: something that answers prompts token by token."""

from collections.abc import AsyncIterator
from typing import Protocol

from clo.runtime.client import AsyncClient


class EndpointError(Exception):
    """A server did not do what a benchmark needs. Its text is one sentence."""


class Endpoint(Protocol):
    """A server, by whatever protocol."""

    def stream(self, prompt: list[int], tokens: int) -> AsyncIterator[int]:
        """Have a prompt answered greedily with so many tokens, whatever they are.

        Yields:
            How many tokens have come, each time that some come.

        Raises:
            EndpointError, CLOError: the server refuses, fails or goes away.
        """
        ...


class CLO:
    """An ``Endpoint`` that asks CLO's router."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def stream(self, prompt: list[int], tokens: int) -> AsyncIterator[int]:
        """See ``Endpoint.stream``."""
        async for chunk in self._client.stream(prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True):
            yield len(chunk.tokens)
