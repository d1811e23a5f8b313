"""Prompts as users give them, to token ids that the engine can serve whatever else runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from operator import index

from ..errors import InvalidRequestError, OutOfPagesError
from ..groups import GroupPools
from ..sampling import SamplingParams
from .arguments import Vocabulary

Prompt = str | Sequence[int]
Checked = tuple[tuple[int, ...], SamplingParams]


class PromptReader:
    """Turns prompts into ids and refuses what cannot be served; its errors name the prompt and what is wrong with it.

    Args:
        tokenizer: for text; None if there is none.
        pools: the pages that a request must fit in.
        vocabulary: of the model.
        limit: tokens a request may reach, pages aside; None for no such limit.
        num_new: tokens of it that are computed at once at most.
    """

    def __init__(self, tokenizer, pools: GroupPools, *, vocabulary: Vocabulary, limit: int | None, num_new: int):
        self._tokenizer, self._vocabulary, self._limit = tokenizer, vocabulary, limit
        self._room, self._pool = pools.tightest(num_new)

    def read_all(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Checked]:
        """Reads one prompt or several, with parameters for all or one each."""
        _refuse_kind("the prompts", prompts)
        try:
            listed = [prompts] if isinstance(prompts, str) else list(prompts)
        except TypeError as error:
            raise InvalidRequestError(f"the prompts are neither text nor a sequence: {error}") from error
        if listed and isinstance(listed[0], Integral):
            listed = [listed]
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise InvalidRequestError(f"{len(each)} SamplingParams for {len(listed)} prompts: give one, or one each")
        pairs = enumerate(zip(listed, each, strict=True))
        return [self.read(prompt, one, f"prompt {at}") for at, (prompt, one) in pairs]

    def read(self, prompt: Prompt, params: SamplingParams | None, name: str = "the prompt") -> Checked:
        """Reads one prompt.

        Raises:
            InvalidRequestError: it is empty, too long, or no ids of the vocabulary, or lacks a tokenizer.
            OutOfPagesError: the whole cache does not hold it.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"the params of {name} are a {type(params).__name__}: give SamplingParams")
        _refuse_kind(name, prompt)
        try:
            given = self._encode(prompt, name) if isinstance(prompt, str) else list(prompt)
            if bool in set(map(type, given)) or str(getattr(prompt, "dtype", "")).endswith("bool"):
                raise TypeError("True and False are no ids")
            ids = tuple(map(index, given))
        except TypeError as error:
            raise InvalidRequestError(f"{name} is neither text nor a sequence of token ids: {error}") from error
        if not ids:
            raise InvalidRequestError(f"{name} is empty: give at least one token")
        _check_ids(ids, self._vocabulary.fed, f"{name} has token")
        _check_ids(params.stop_token_ids, self._vocabulary.drawn, f"stop_token_ids of {name} has")
        if params.repetition_penalty != 1:
            _check_ids(ids, self._vocabulary.drawn, f"a repetition_penalty is for what can be drawn, and {name} has")
        if self._limit is not None and len(ids) >= self._limit:
            raise InvalidRequestError(
                f"{name} has {len(ids)} tokens, max_seq_len is {self._limit}: there is no room to generate"
            )
        if self._room is not None and len(ids) >= self._room:
            raise OutOfPagesError(
                f"{name} has {len(ids)} tokens and needs {self._pool.pages_for(len(ids) + 1)} pages to generate one "
                f"more, the cache has {self._pool.num_usable} (page_size={self._pool.page_size}): give the cache more"
            )
        if params.stop and self._tokenizer is None:
            raise InvalidRequestError(f"stop={params.stop}: stop strings need a tokenizer; use stop_token_ids")
        return ids, params

    def read_chat(self, messages: Sequence[dict] | Sequence[Sequence[dict]]) -> list[list[int]]:
        """Ids of one conversation or several through the model's chat template.

        Raises:
            InvalidRequestError: there is no tokenizer, or it has no chat template.
        """
        if self._tokenizer is None or not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequestError("chat needs a tokenizer with a chat template: pass tokenizer=, or use generate")
        one = isinstance(messages, Sequence) and messages and isinstance(messages[0], Mapping)
        conversations = [messages] if one else messages
        no_list = not isinstance(messages, Sequence) or isinstance(messages, str)
        if no_list or not all(map(_is_conversation, conversations)):
            raise InvalidRequestError(
                'chat takes messages like [{"role": "user", "content": "..."}], or a list of such lists; text goes to '
                "generate"
            )
        options = {"add_generation_prompt": True, "tokenize": False}
        try:
            texts = [self._tokenizer.apply_chat_template(conversation, **options) for conversation in conversations]
        except Exception as error:  # a template is a program of the model's, and raises what it likes
            raise InvalidRequestError(
                f"the chat template refused the messages: {type(error).__name__}: {error}"
            ) from error
        return [self._encode(text, "the conversation", add_special_tokens=False) for text in texts]

    def _encode(self, text: str, name: str, **options) -> list[int]:
        if self._tokenizer is None:
            raise InvalidRequestError(f"{name} is text and there is no tokenizer: pass tokenizer= or token ids")
        return self._tokenizer(text, **options)["input_ids"]


def _check_ids(ids: Sequence[int], end: int, what: str) -> None:
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < end:
            raise InvalidRequestError(f"{what} {token_id} at position {position}: ids go from 0 to {end - 1}")


def _is_conversation(messages: object) -> bool:
    is_list = isinstance(messages, Sequence) and len(messages) > 0
    return is_list and all(isinstance(message, Mapping) for message in messages)


def _refuse_kind(name: str, prompt: object) -> None:
    """Raises InvalidRequestError for what can be iterated and is no prompt: its items would pass for one."""
    if isinstance(prompt, (Mapping, bytes, bytearray, set, frozenset)):
        kind = type(prompt).__name__
        raise InvalidRequestError(f"{name}: a {kind} is neither text nor token ids; pass a str or a list of ints")
