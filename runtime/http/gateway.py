"""What all HTTP requests share: the client of the router, the tokenizer, and the facts of the model."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Literal, TypeVar

from clo.runtime.client import AsyncClient
from clo.runtime.config import GatewayProcessConfig
from clo.runtime.http import tool_calls
from clo.runtime.http.errors import APIError
from clo.runtime.http.reasoning import BEGIN, END
from clo.runtime.http.requests import Tool
from clo.runtime.http.tool_calls import HermesParser, Llama3Parser, ToolCallParser
from clo.runtime.http.traces import Tracer
from clo.runtime.tokenizer import Tokenizer, takes_long
from clo.runtime.wire.errors import CLOError
from clo.runtime.wire.messages import Chat, Text, Tokens

WATCH_S = 1.0  # between two questions for the server's state
STALE_S = 10.0  # after which the last answer says nothing about it any more
THREADS = 4  # that tokenise long prompts
T = TypeVar("T")
_TAIL_TOKENS = 16  # at the end of a prompt, among which a "<think>" would be


class Gateway:
    """Made in the event loop that serves.

    Args:
        config: of the process.
        api_key: what clients have to know, None for nothing.

    Attributes:
        names: those of the model, the first one for answers.
        created: when the gateway was started, in seconds since 1970.
        open: requests for tokens that are open.
        tracer: makes their spans; None for none.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, config: GatewayProcessConfig, api_key: str | None) -> None:
        model, options = config.model, config.gateway
        self.api_key, self.names = api_key, options.served_model_name or (model.name,)
        self.root, self.max_model_len = model.name, model.max_model_len
        self.created, self.open = int(time.time()), 0
        self.allowed_origins = options.allowed_origins or ()
        self.client = AsyncClient(config.server, api_key=api_key)
        self.tokenizer = Tokenizer(model.folder, model.vocab_size)
        self.spell = lru_cache(maxsize=100_000)(self.tokenizer.spell)
        template = self.tokenizer.chat_template
        calls, reasoning = options.tool_call_parser, options.reasoning_parser
        self._tool_calls = tool_calls.family(template) if calls == "auto" else calls
        self.thinks = END in template if reasoning == "auto" else reasoning == "think"
        self._threads = ThreadPoolExecutor(THREADS, "tokenizer")
        endpoint = options.otlp_traces_endpoint
        self.tracer = None if endpoint is None else Tracer(endpoint, self.names[0])
        self._state: Literal["starting", "ready"] = "starting"
        self._heard = time.monotonic()

    async def state(self) -> Literal["starting", "ready", "unreachable"]:
        """Of the server; known at once where it was ready a moment ago."""
        if self._state == "starting":
            await self._look()
        return self._state if time.monotonic() - self._heard < STALE_S else "unreachable"

    async def watch(self) -> None:
        """Keep asking for the server's state."""
        while True:
            await self._look()
            await asyncio.sleep(WATCH_S)

    async def _look(self) -> None:
        with suppress(CLOError):  # that there was no answer shows in ``state``
            self._state = (await self.client.info()).state
            self._heard = time.monotonic()

    def check_model(self, name: str | None) -> None:
        """Raises ``APIError`` where a request is for another model."""
        if name is not None and name not in self.names:
            text = f"The model '{name}' does not exist; this server has {', '.join(self.names)}."
            raise APIError(text, 404, param="model", code="model_not_found")

    async def tokens(self, prompt: Text | Chat | Tokens, *, special: bool = True) -> list[int]:
        """Token ids of a prompt; see ``Tokenizer.encode``.

        Raises:
            APIError: there are none, or too many.
        """
        encode = partial(self.tokenizer.encode, prompt, self.max_model_len, special=special)
        try:
            if not takes_long(prompt):
                return encode()
            return await self.aside(encode)
        except CLOError as error:
            raised = APIError.of(error)
            raised.param = "messages" if isinstance(prompt, Chat) else "prompt"
            raise raised from None

    async def aside(self, work: Callable[[], T]) -> T:
        """Do in a thread what takes long for many tokens, while others are served."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def begins_thinking(self, prompt: list[int]) -> bool:
        """Whether a prompt ends with the beginning of what the model is going to think."""
        return self.tokenizer.decode(prompt[-_TAIL_TOKENS:], special=True).rstrip().endswith(BEGIN)

    def tool_call_parser(self, tools: list[Tool]) -> ToolCallParser:
        """For one answer to a request that offers tools, which the model may call or not.

        Raises:
            APIError: it is not known how the model writes calls.
        """
        match self._tool_calls:
            case "hermes":
                return HermesParser()
            case "llama3_json":
                return Llama3Parser({tool.function.name for tool in tools})
        raise APIError(
            "'tools' are not supported with this model, whose chat template has no form of calls that is "
            "known; leave them out, or start the server with --tool-call-parser.",
            param="tools",
            code="unsupported_parameter",
        )

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request for tokens as open."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
