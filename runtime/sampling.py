"""What a request asks for: whether it can be had, and what the model's defaults make of it."""

from clo.runtime.config import ResolvedModel
from clo.runtime.model.generation import read_generation
from clo.runtime.wire.errors import InvalidRequest, PromptTooLong, context_is
from clo.runtime.wire.messages import Sampling, SamplingParams


class SamplingRules:
    """The rules of one model.

    Args:
        model: the model that is served.

    Raises:
        ConfigError: its files about generating are damaged.
    """

    def __init__(self, model: ResolvedModel) -> None:
        self._model = model
        self._defaults = read_generation(model.folder)

    def check(self, params: SamplingParams, prompt: int) -> None:
        """Refuse what a prompt of so many tokens cannot have.

        Raises:
            InvalidRequest: parameters contradict each other or the vocabulary.
            PromptTooLong: the prompt and its answer exceed the model length.
        """
        if params.max_tokens == 0 and params.prompt_logprobs is None:
            raise InvalidRequest("max_tokens is 0, which only scores a prompt; set prompt_logprobs too.")
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens} and max_tokens is {params.max_tokens}; lower min_tokens."
            )
        for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if max(tokens, default=0) >= self._model.vocab_size:
                raise InvalidRequest(
                    f"{name} has the token id {max(tokens)}, which is not in the vocabulary; ids go up to "
                    f"{self._model.vocab_size - 1}."
                )
        longest, max_tokens = self._model.max_model_len, params.max_tokens
        if max_tokens is None and prompt + max(1, params.min_tokens) > longest:
            answer = f"an answer of {params.min_tokens} tokens" if params.min_tokens else "an answer"
            raise PromptTooLong(
                f"The prompt has {prompt} tokens, which leaves no room for {answer}: {context_is(longest)}. "
                "Shorten the prompt."
            )
        if max_tokens is not None and prompt + max_tokens > longest:
            raise PromptTooLong(
                f"The prompt has {prompt} tokens and max_tokens is {max_tokens}, which is too much together: "
                f"{context_is(longest)}. Shorten the prompt or lower max_tokens."
            )

    def fill_in(self, params: SamplingParams, prompt: int, capacity: int, grammar: str | None) -> Sampling:
        """What a worker is told: ``params`` with the model's defaults.

        Args:
            params: what ``check`` has let through.
            prompt: tokens of the prompt.
            capacity: tokens that the worker's store holds.
            grammar: that the answer follows, one of llguidance, if any.
        """
        defaults = self._defaults
        room = min(self._model.max_model_len, capacity) - prompt
        max_tokens, penalty = params.max_tokens, params.repetition_penalty
        if max_tokens is None:
            wanted = room if defaults.max_tokens is None else min(defaults.max_tokens, room)
            max_tokens = max(1, params.min_tokens, wanted)
        return Sampling(
            temperature=defaults.temperature if params.temperature is None else params.temperature,
            top_p=defaults.top_p if params.top_p is None else params.top_p,
            top_k=defaults.top_k if params.top_k is None else max(0, params.top_k),
            min_p=defaults.min_p if params.min_p is None else params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=defaults.repetition_penalty if penalty is None else penalty,
            logit_bias=params.logit_bias,
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            grammar=grammar,
            cache_salt=params.cache_salt,
        )
