"""Every message of CLO, one dataclass each, grouped by who receives it.

The wire format is MessagePack. A message is a map with its class name under ``type``; decoding checks the
name, the fields and their types (``msgspec``), so a handler only ever sees valid values.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from clo.runtime.wire.kv_events import KVEvent

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # for one message on any socket; a prompt of 10 M tokens fits
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024  # tokens of one request
MAX_JSON = 2**20  # characters of what a client hands to a chat template as JSON
MAX_JSON_VALUES = 100_000  # in it, so that it is parsed in a moment

RequestId = Annotated[str, Meta(min_length=1, max_length=64)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Reason = Literal["stop", "length", "cancelled"]
"""Why a request ended that did not fail."""


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


# ---------------------------------------------------------------------------------------- parts


class Text(Message, frozen=True):
    """A plain text prompt; tokenised as it is, with the special tokens that the tokenizer adds."""

    text: str


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A part of a chat message; CLO serves no others."""

    text: str


# What is JSON here stays text until a thread parses it: as objects it could take seconds to decode, and
# gigabytes, which the event loop of the router has not got.
JSONText = Annotated[str, Meta(max_length=MAX_JSON)]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tool call calls; its arguments are an object in JSON, as in OpenAI's API."""

    name: str
    arguments: JSONText


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that the assistant made in an earlier message."""

    function: Function
    id: str | None = None
    type: Literal["function"] = "function"


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chat message; the fields are those of OpenAI's API."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # what the assistant thought before its answer; for templates

    @property
    def text(self) -> str:
        """The content as one string; parts become lines, and no content is an empty string, as in vLLM."""
        if isinstance(self.content, list):
            return "\n".join([part.text for part in self.content])
        return self.content or ""


class Chat(Message, frozen=True):
    """Chat messages; rendered with the model's chat template.

    ``chat_template_kwargs`` are further variables of the template, such as ``enable_thinking`` for Qwen3, or
    ``tools``: an object in JSON, or empty for none. It and the arguments of all tool calls together are
    bounded by ``MAX_JSON`` and ``MAX_JSON_VALUES``.
    """

    turns: Annotated[list[Turn], Meta(max_length=100_000)]
    chat_template_kwargs: JSONText = ""


class Tokens(Message, frozen=True):
    """Token ids, used as they are."""

    ids: Annotated[list[TokenId], Meta(max_length=10_000_000)]


Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, lt=2**31)]
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=100.0)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_LOGIT_BIAS)
]
MinTokens = Annotated[int, Meta(ge=0, lt=2**31)]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=128)]
MaxTokens = Annotated[int, Meta(ge=1, lt=2**31)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
CacheSalt = Annotated[str, Meta(max_length=256)]


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the text of an answer must be; exactly one of the fields is set. Names and meanings are vLLM's.

    ``json`` is a JSON schema, as an object or as text; ``json_object`` True is any JSON object; ``regex`` a
    regular expression that the whole text matches; ``choice`` texts of which it is one; ``grammar`` a grammar
    in the syntax of Lark or of llama.cpp (GBNF).
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a client wants tokens to be chosen. Names and meanings are vLLM's, and so is the order in which
    they have an effect, which ``clo.kernels.sample`` says.

    Where one of ``temperature``, ``top_p``, ``top_k``, ``min_p`` and ``repetition_penalty`` is None the
    model's generation_config.json decides, and without an entry there it is 1, 1, 0, 0 and 1, which change
    nothing. ``temperature`` 0 is greedy; ``top_k`` 0 or -1 keeps all. ``repetition_penalty`` is about the
    tokens of prompt and answer, the other two penalties are about those of the answer alone. ``logit_bias``
    is added to the logits of tokens.

    ``max_tokens`` None takes what generation_config.json says as ``max_new_tokens``, or else all that is left
    of the context and of the KV store; 0 scores the prompt and goes with ``prompt_logprobs`` alone. Among
    the first ``min_tokens`` tokens is neither an end token nor one of ``stop_token_ids``, and no stop string
    ends there; a text that ``structured_outputs`` has completed ends nevertheless. One of ``stop_token_ids``
    ends the answer also where ``ignore_eos`` is set, and gives no text.

    ``seed`` makes a request repeatable in any batch; -1 is as good as None. ``logprobs`` n returns the
    log-probability of each token and of the n most likely ones, and ``prompt_logprobs`` n the same for the
    tokens of the prompt but the first; all of them are of the model's own logits, before any of the above.
    ``echo`` puts the text of the prompt before that of the answer. A prompt finds the KV of an earlier one
    only if that had the same ``cache_salt``.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias = {}
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    min_tokens: MinTokens = 0
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1000)]], Meta(max_length=16)] = []
    stop_token_ids: StopTokenIds = []
    seed: Seed | None = None
    ignore_eos: bool = False
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    echo: bool = False
    cache_salt: CacheSalt = ""
    structured_outputs: StructuredOutputs | None = None


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a worker chooses the tokens of one request: ``SamplingParams`` with every default filled in.
    ``top_k`` 0 keeps all; ``max_tokens`` 0 scores the prompt; ``grammar`` is one of llguidance."""

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    min_p: MinP = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: LogitBias = {}
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] = 256
    min_tokens: MinTokens = 0
    stop_token_ids: StopTokenIds = []
    ignore_eos: bool = False
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    grammar: str | None = None
    cache_salt: CacheSalt = ""

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits, as few requests want."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
            or self.grammar
        )


class Logprob(msgspec.Struct, frozen=True):
    """Natural log-probabilities at one position: the token's own, and the most likely tokens' by falling
    probability."""

    token: TokenId
    logprob: float
    top: list[tuple[TokenId, float]]


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0  # of the prompt, whose KV was there already


class CacheStats(msgspec.Struct, frozen=True):
    """What the cache did for one request, summed over its decode steps, layers and KV heads."""

    steps: Count  # decode steps
    head_steps: Count  # steps x layers x KV heads: denominator of rates per step and head
    gate_checks: Count  # times that a head's query met the gate: twice a head_step where a prefetch did too
    selections: Count  # how many of these checks led to a new selection
    selected_rows: Count  # rows that those selections chose
    fetched_rows: Count  # how many of these were not resident and came from CPU memory
    fetched_bytes: Count
    tail_millionths: Count  # of each head_step's attention, what the tail has
    missed_millionths: Count  # by the scores of each selection, of what was not resident: what no tail has
    resident_bytes: Count  # rows held on the worker for this request
    index_bytes: Count  # codes held on the worker for this request
    kv_bytes: Count  # the whole KV of this request, in the store
    cached_tokens: Count  # of its prompt, whose KV was there already

    @property
    def hit_rate(self) -> float:
        """Share of selected rows that were resident already."""
        return 1.0 - self.fetched_rows / self.selected_rows if self.selected_rows else 1.0

    @property
    def tail_share(self) -> float:
        """Share of the attention that goes to the tail."""
        return self.tail_millionths / 1e6 / self.head_steps if self.head_steps else 0.0

    @property
    def dropped_share(self) -> float:
        """Share of the attention that goes nowhere, estimated from the scores; 0 without a tail, where nobody
        looks."""
        missed = self.missed_millionths / 1e6 / self.selections if self.selections else 0.0
        return self.tail_share * missed / max(1e-6, 1.0 - missed)

    @property
    def reuse_rate(self) -> float:
        """Share of gate checks after which the head kept its rows without selecting."""
        return 1.0 - self.selections / self.gate_checks if self.gate_checks else 0.0

    @property
    def rows_per_step_and_head(self) -> float:
        return self.fetched_rows / self.head_steps if self.head_steps else 0.0


NO_STATS = CacheStats(*[0] * 13)  # for a request that never decoded


class StoreStats(msgspec.Struct, frozen=True):
    store: str
    arena_bytes: Count
    block_bytes: Count
    blocks: Count
    free_blocks: Count  # held by no sequence
    kept_blocks: Count  # those of them that hold rows of prompts, for others that begin like them
    sequences: Count
    waiting: Count  # allocations that wait for blocks
    asked_tokens: Count  # of prompts that could have shared blocks
    cached_tokens: Count  # how many of these were there already
    disk_blocks: Count = 0  # of which there are copies on disk
    disk_hits: Count = 0  # blocks that have come back from there
    disk_unusable: Count = 0  # files that were not what they should be, or could not be read


class DriftStats(msgspec.Struct, frozen=True):
    """Decode steps compared with full attention since the worker's start."""

    checks: Count
    mean_kl: float  # from full attention's next token to the step's, in nats
    agreement: float  # share of checks with the same most likely token


class HeadRows(msgspec.Struct, frozen=True):
    """Rows that the heads of a worker selected, and those of them that came from CPU memory, by layer and KV
    head: [layers][kv_heads]. They are summed over all requests that have left the worker, as those of
    ``Traffic.cache`` are over all workers."""

    selected: list[list[Count]]
    fetched: list[list[Count]]


class WorkerStats(msgspec.Struct, frozen=True):
    worker: Count
    running: Count
    decoding: Count  # how many of these have their prompts complete
    waiting: Count
    steps: Count
    generated_tokens: Count
    resident_bytes: Count  # allocated for all slots, at all ranks
    index_bytes: Count
    # memory of the worker process, the first of several, that is not the arena (RssAnon)
    private_bytes: Count
    gpu_bytes: Count  # GPU memory that PyTorch holds for that process, in use or not; 0 on the CPU
    drift_check: DriftStats | None  # None without --drift-check
    head_rows: HeadRows | None  # None with full attention, which selects nothing
    # those fetched by layers that choose no earlier; None where they are not told apart
    late_rows: Count | None
    preemptions: Count = 0  # how often a sequence gave back its blocks so that another could grow


class Histogram(msgspec.Struct, frozen=True):
    """How many values were at most each bound and above the one before; the last count has no bound."""

    bounds: list[float]
    counts: list[Count]
    sum: float


class Traffic(msgspec.Struct, frozen=True):
    """What a server has done since its start, for all clients together. Times are in seconds."""

    prompt_tokens: Count  # of requests whose first token has come
    generated_tokens: Count
    ended: dict[Reason | Literal["failed"], Count]  # requests, by how they ended
    first_token: Histogram  # from a request's arrival to its first token
    token_gap: Histogram  # from one token of a request to the next
    request: Histogram  # from a request's arrival to its end
    step_tokens: Histogram  # tokens that one step of a worker brought
    cache: CacheStats  # summed over all requests that have left their workers


# ------------------------------------------------------------------- client -> router (TCP, DEALER)


class Generate(Message, frozen=True):
    """Generate from a prompt. With ``continuation`` the model is teacher-forced instead: these tokens are
    fed one by one through the decode path and their log-probabilities returned."""

    request: RequestId
    prompt: Text | Chat | Tokens
    sampling: SamplingParams = SamplingParams()
    continuation: Text | Tokens | None = None


class Cancel(Message, frozen=True):
    request: RequestId


class GetInfo(Message, frozen=True):
    request: RequestId


ToRouter = Generate | Cancel | GetInfo


# ------------------------------------------------------------------------------ router -> client


class Progress(Message, frozen=True):
    """Sent while a request waits or prefills, at least once a second. ``stage`` is "stalled" where a process
    that the request needs has not answered for some seconds."""

    request: str
    stage: Literal["queued", "prefill", "stalled"]
    done: int  # tokens prefilled
    total: int


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New text of one request, and the tokens that brought it: one token as it is sent, and more where a
    client reads late. ``text`` may be empty while a stop string or a character is incomplete."""

    request: str
    text: str
    tokens: list[int]
    logprobs: list[Logprob] | None


class Chunks(Message, frozen=True):
    """What one decode step brought for the requests of one client, all together."""

    chunks: list[Chunk]


class PromptChunk(Message, frozen=True):
    """Tokens of a prompt whose log-probabilities were asked for, in order; all of them come before the first
    token of the answer. The first one of a prompt has None, as nothing predicts it."""

    request: str
    tokens: list[int]
    logprobs: list[Logprob | None]


class Finished(Message, frozen=True):
    request: str
    reason: Reason
    usage: Usage
    cache: CacheStats


class Failed(Message, frozen=True):
    """The request ended without a result. ``request`` is empty where none could be read."""

    request: str
    code: str
    text: str


class Info(Message, frozen=True):
    """The answer to ``GetInfo``. A server is "starting" until all of its processes are ready."""

    request: str
    state: Literal["starting", "ready"]
    model: str
    max_model_len: int
    capacity_tokens: int
    attention: str
    workers: list[WorkerStats]
    stores: list[StoreStats]
    waiting: Count  # requests that no worker has yet
    traffic: Traffic


ToClient = Progress | PromptChunk | Chunks | Finished | Failed | Info


# ------------------------------------- a program of the server's user -> launcher (ipc, DEALER), and back


class Reload(Message, frozen=True):
    """Restart the workers one after another, with the code that is on disk; answered by ``Reloaded``, or by
    ``Failed``, whose ``request`` is empty, and about every second before that by ``Working``."""


BlockName = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Examine(Message, frozen=True):
    """Find out whether the stores' books are right; answered by ``Examined`` or ``Failed``. The store gets it
    from the launcher, and answers with ``StoreExamined``.

    ``names`` and up to ``sample`` others are blocks of prompts to be described. The sample is from the first
    ``longest`` tokens of prompts."""

    sample: Annotated[int, Meta(ge=0, le=1000)] = 0
    longest: Count = 0
    names: Annotated[list[BlockName], Meta(max_length=1000)] = []
    number: Count = 0  # is in the answer again


class Working(Message, frozen=True):
    """Something that was asked for is under way: ``done`` of ``total`` parts, which may not be known yet."""

    done: Count
    total: Count


class Reloaded(Message, frozen=True):
    """The processes of the workers, in order; of several ranks the first one's."""

    pids: list[Count]


class PromptBlock(msgspec.Struct, frozen=True):
    """A committed block: its name, its number in the arena, the tokens of a prompt up to its end, and how
    many of these were in blocks already when its rows were computed, at most."""

    name: BlockName
    block: Count
    tokens: list[TokenId]
    behind: Count


class StoreExamined(Message, frozen=True):
    """What a store has found in its books, each thing that is ``wrong`` as a sentence; where its arena is,
    see ``Attached``; and the blocks that were asked for, as far as they are there."""

    store: str
    number: Count
    wrong: list[str]
    blocks: Count
    block_tokens: Count
    free_blocks: Count  # that hold nothing
    kept_blocks: Count  # of prompts, held by no sequence
    committed_blocks: Count  # of prompts, kept or held
    sequences: Count  # that hold blocks
    waiting: Count
    pid: Count
    fd: Count
    arena_bytes: Count
    block_bytes: Count
    described: list[PromptBlock]


class Examined(Message, frozen=True):
    """What all stores have found. ``model`` is the model that is served, as the launcher tells workers."""

    stores: list[StoreExamined]
    model: str


ToControl = Reload | Examine
FromControl = Working | Reloaded | Examined | Failed


# ------------------------------------------------- router -> worker, store or HTTP gateway (ipc, DEALER)


class Ping(Message, frozen=True):
    """Answered with ``Pong``; see ``clo.runtime.wire.liveness``."""


class Expect(Message, frozen=True):
    """To a store: ``worker`` is now the process ``pid``, which is going to connect to ``endpoint``."""

    worker: Count
    pid: Count
    endpoint: str


class Run(Message, frozen=True):
    """Serve a request. ``sequence`` is unique in the router's life; ``client`` says whose it is, as clients
    take turns. The last ``answered`` of the tokens are the answer so far, from a worker that has ended; all
    that ``sampling`` and ``forced`` say is of the whole answer."""

    sequence: Count
    tokens: list[TokenId]
    sampling: Sampling
    seed: Count
    eos: list[TokenId]
    forced: list[TokenId] | None
    client: Count = 0
    answered: Count = 0


class Abort(Message, frozen=True):
    """Stop a request; answered with ``Done`` (reason "cancelled"). Unknown sequences are ignored."""

    sequence: Count


class GetWorkerStats(Message, frozen=True):
    pass


ToWorker = Run | Abort | GetWorkerStats | Ping
LauncherToStore = Ping | Expect | Examine


# ------------------------------------------------------------- worker, store or HTTP gateway -> router


def worker_identity(worker: int, rank: int = 0) -> bytes:
    """Name of a worker's connection to the router; of a rank that is not its first, that rank's."""
    return b"worker-%d-rank-%d" % (worker, rank) if rank else b"worker-%d" % worker


GATEWAY_IDENTITY = b"gateway"
"""Name of the HTTP gateway's connection to the router."""


def store_identity(store: str) -> bytes:
    """Name of a store's connection to the router."""
    return b"store-" + store.encode()


class Pong(Message, frozen=True):
    pass


class KVEvents(Message, frozen=True):
    """What has changed in a store, where somebody wants to know."""

    events: list[KVEvent]


class StoreReady(Message, frozen=True):
    """First message of a store, once its arena is there."""

    pid: Count


class GatewayReady(Message, frozen=True):
    """First message of the HTTP gateway, once it listens. Its requests come as a client's."""

    pid: Count


class Ready(Message, frozen=True):
    """First message of a worker, once it can serve."""

    worker: Count
    pid: Count
    store: str
    capacity_tokens: Count  # tokens that its store holds
    slots: Annotated[int, Meta(ge=1, lt=2**31)]  # sequences that it decodes at a time


class Step(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One new token of one sequence."""

    sequence: Count
    token: TokenId
    logprob: Logprob | None


class Stepped(Message, frozen=True):
    """The tokens of one decode step, all sequences together."""

    steps: list[Step]


class Prefilled(Message, frozen=True):
    sequence: Count
    done: Count
    total: Count


class PromptScored(Message, frozen=True):
    """Log-probabilities of a prompt's tokens from its token ``start`` on, which is at least 1."""

    sequence: Count
    start: Count
    logprobs: list[Logprob]


class Done(Message, frozen=True):
    sequence: Count
    reason: Reason
    cache: CacheStats


class Refused(Message, frozen=True):
    sequence: Count
    code: str
    text: str


class WorkerReport(Message, frozen=True):
    worker: WorkerStats
    store: StoreStats


class RankReady(Message, frozen=True):
    """First message of a rank of a worker that is not its first one, once it follows that one."""

    pid: Count


FromWorker = Ready | Stepped | Prefilled | PromptScored | Done | Refused | WorkerReport | Pong
FromChild = FromWorker | RankReady | StoreReady | GatewayReady | KVEvents | StoreExamined


# ------------------------------------------------------------------------- worker -> store (ipc, DEALER)


class Attach(Message, frozen=True):
    """First message of a worker, which the store has to know from its configuration."""

    worker: Count
    pid: Count


class Allocate(Message, frozen=True):
    """Ask for ``blocks`` blocks, which ``Grow`` may make ``most``. Answered by ``Allocated`` when they are
    free, in order of asking, or by ``Denied`` at once when the store could never hold ``most``."""

    sequence: Count
    blocks: Annotated[int, Meta(ge=1)]
    prompt: list[TokenId] = []  # whose blocks it may share with others; empty for none
    own: Annotated[int, Meta(ge=1)] = 1  # last tokens of the prompt that it computes itself
    salt: CacheSalt = ""  # it shares them with prompts under the same one
    most: Count = 0  # as many as ``blocks`` where it is fewer


class Grow(Message, frozen=True):
    """Ask for so many more blocks of a sequence, before all who wait for their first ones. Answered by
    ``Grown``: at once, and where there are too few free blocks then, once more when there are enough."""

    sequence: Count
    blocks: Annotated[int, Meta(ge=1)]


class Commit(Message, frozen=True):
    """Tokens ``start`` .. ``start + len(tokens) - 1`` of a sequence are now in its blocks."""

    sequence: Count
    start: Count
    tokens: list[TokenId]


class Free(Message, frozen=True):
    """Give back all blocks of a sequence, or withdraw its waiting ``Allocate``; answered by ``Freed``."""

    sequence: Count


class GetStoreStats(Message, frozen=True):
    pass


class Describe(Message, frozen=True):
    """Ask what the blocks of one sequence hold."""

    sequence: Count


class GPUMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory of a GPU that another process may open."""

    device: str  # PCI bus id: ordinals may differ between processes
    handle: Annotated[bytes, Meta(min_length=64, max_length=64)]  # a CUDA IPC handle


class OpenStaging(Message, frozen=True):
    """Make known where pushes to this worker go; answered by ``StagingOpened``. It replaces an earlier one.

    File descriptor ``fd`` of the worker is a page of control words (``clo.kvstore.push``). The ``bytes``
    bytes for rows are in GPU memory, or follow that page.
    """

    fd: Count
    bytes: Annotated[int, Meta(ge=1, lt=2**48)]
    gpu: GPUMemory | None


class Push(Message, frozen=True):
    """Copy one layer's rows of ``blocks`` blocks of a sequence, from its block ``first_block`` on, to
    ``offset`` of the staging, as [kv_head][block][token][K|V][head_dim]; then set the flag to ``number``.
    Answered by the flag, or by ``Denied``. Numbers grow."""

    sequence: Count
    layer: Count
    first_block: Count
    blocks: Annotated[int, Meta(ge=1)]
    offset: Count
    number: Annotated[int, Meta(ge=1, le=2**63 - 1)]


ToStore = Attach | Allocate | Grow | Commit | Free | GetStoreStats | Describe | OpenStaging | Push


# ------------------------------------------------------------------------------- store -> worker


class Attached(Message, frozen=True):
    """Where the arena is: file descriptor ``fd`` of process ``pid``, to be opened through /proc."""

    store: str
    pid: Count
    fd: Count
    arena_bytes: Count
    blocks: Count


class Allocated(Message, frozen=True):
    """Blocks of a sequence; the first ``cached`` hold the rows of its first tokens already, and those of
    others: nobody writes to them any more."""

    sequence: Count
    blocks: list[Count]
    cached: Count = 0


class Grown(Message, frozen=True):
    """Further blocks of a sequence; none where others have to give back some first."""

    sequence: Count
    blocks: list[Count]


class Denied(Message, frozen=True):
    """The answer to a message that cannot be carried out.

    ``answers`` is the type of that message, such as "Allocate", or empty where it could not be read;
    ``sequence`` is -1 where it was not about one."""

    answers: str
    sequence: int
    code: str
    text: str


class Freed(Message, frozen=True):
    sequence: Count
    blocks: Count


class StoreReport(Message, frozen=True):
    stats: StoreStats


class Described(Message, frozen=True):
    """Block ids of a sequence and, for each, the tokens that it holds."""

    sequence: int
    blocks: list[Count]
    tokens: list[list[TokenId]]


class StagingOpened(Message, frozen=True):
    pass


FromStore = Attached | Allocated | Grown | Denied | Freed | StoreReport | Described | StagingOpened


# ------------------------------------------- first rank of a worker -> its other ranks (socket pair)


class BeginPrefill(Message, frozen=True):
    """Begin the prefill of a prompt in a free slot; the fields are those of ``Engine.begin_prefill``."""

    slot: Count
    tokens: list[TokenId]
    blocks: list[Count]
    last: Count
    score: Count | None
    cached: Count
    graphs: bool


class Advance(Message, frozen=True):
    """A unit of so many tokens of the prefill of a slot."""

    slot: Count
    tokens: Count


class PrefillShort(Message, frozen=True):
    """Prefill short prompts together, each with its slot and blocks."""

    slots: list[Count]
    tokens: list[list[TokenId]]
    blocks: list[list[Count]]


class LeavePrompt(Message, frozen=True):
    """A prompt ends before it is complete."""


class Activate(Message, frozen=True):
    """The sequence of a slot, so many tokens long, decodes from now on."""

    slot: Count
    length: Count


class Start(Message, frozen=True):
    """Take the first tokens of activated slots."""

    slots: list[Count]


class Extend(Message, frozen=True):
    """A slot has further blocks."""

    slot: Count
    blocks: list[Count]


class Feed(Message, frozen=True):
    """The next step reads another token of a slot than was drawn."""

    slot: Count
    token: TokenId


class Compare(Message, frozen=True):
    """Compute the next step of a slot with full attention, too; its sequence then has so many tokens."""

    slot: Count
    length: Count


class TakeStep(Message, frozen=True):
    """A decode step of so many slots; the longest sequence then has so many tokens."""

    slots: list[Count]
    longest: Count


class Retire(Message, frozen=True):
    """The sequence of a slot ends."""

    slot: Count


Command = (
    BeginPrefill
    | Advance
    | PrefillShort
    | LeavePrompt
    | Activate
    | Start
    | Extend
    | Feed
    | Compare
    | TakeStep
    | Retire
)
