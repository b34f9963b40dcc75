"""Prompts to tokens, and tokens to text piece by piece up to a stop string."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire.errors import CLOError, ConfigError, InvalidRequest, PromptTooLong
from clo.runtime.wire.messages import Chat, Function, Text, TextPart, Tokens, ToolCall, Turn
from tests.conftest import SPECIAL, VOCABULARY

LIMIT = 100
UNKNOWN = 5  # ids at the end of the model's vocabulary that the tokenizer lacks
HELLO = Chat([Turn("system", "be brief"), Turn("user", "hé 你好 <b>&amp;</b>\n ")])
TEXTS = (
    "",
    "plain words",
    "é",
    "naïve café, 3 € 你好",
    "👩‍👩‍👧🇩🇪 e\u0301",
    " \n\t a  b ",
    "\ufffd?",
    "a\x00b",
)


@pytest.fixture(scope="module")
def byte_level(tiny_model: Path) -> Tokenizer:
    """Any bytes are possible, so also invalid UTF-8."""
    return Tokenizer(tiny_model, VOCABULARY + UNKNOWN)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As of Llama 2 and Mistral: '▁' for a space, dropped at the beginning, and bytes for rare characters."""
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,"]
    tokenizer = FastTokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("byte-fallback")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(folder)
    return Tokenizer(folder, len(tokens))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As of newer SentencePiece models: '▁' for a space; the first token's is dropped."""
    tokens = ["<s>", "▁▁", "▁a", "b▁", *"▁abc,é€你👍\u0301\u200d\n"]
    tokenizer = FastTokenizer(models.Unigram([(token, -float(len(token))) for token in tokens], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    folder = tmp_path_factory.mktemp("metaspace")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(folder)
    return Tokenizer(folder, VOCABULARY + UNKNOWN)


@pytest.fixture(scope="module")
def default_model(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2, 49_152)


@pytest.fixture(scope="module")
def decoded_again(tiny_model: Path) -> Tokenizer:
    """As a tokenizer that decodes in a way of its own."""
    tokenizer = Tokenizer(tiny_model, VOCABULARY + UNKNOWN)
    tokenizer.spelling = None
    return tokenizer


def test_tokens_of_usual_tokenizers_need_not_be_decoded_again(
    byte_level: Tokenizer, byte_fallback: Tokenizer, metaspace: Tokenizer, default_model: Tokenizer
) -> None:
    for tokenizer in (byte_level, byte_fallback, default_model):
        spelling = tokenizer.spelling
        assert spelling is not None
        assert spelling.whole.keys() | spelling.parts.keys() == tokenizer.spoken
        for token, text in spelling.whole.items():
            assert tokenizer.decode([token]) == (text.removeprefix(" ") if spelling.drops_space else text)
    assert metaspace.spelling is None, "a space is left out wherever the first token has one"


def pieces_of(
    tokenizer: Tokenizer, tokens: list[int], stop: list[str] | None = None, prompt: list[int] | None = None
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], stop or [])
    return [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]


MARKING = ("byte_fallback", "metaspace")  # tokenizers whose first token has no space before it


@pytest.mark.parametrize("name", ["byte_level", "default_model", "decoded_again", *MARKING])
@pytest.mark.parametrize("seed", range(30))
def test_an_answer_is_the_text_that_it_adds_to_its_prompt(
    name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(seed)
    prompt = tokenizer.encode(Text("a" + random_text(rng) + "b" * (seed % 2)), 1000)
    answer = tokenizer.encode(Text(" a" + random_text(rng)), 1000, continues=True)
    whole = tokenizer.decode(prompt + answer)
    assert "".join(pieces_of(tokenizer, answer, prompt=prompt)) == whole[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("name", MARKING)
def test_the_first_space_of_an_answer_stays(name: str, request: pytest.FixtureRequest) -> None:
    """Also before a stop string, behind special tokens, and where nothing but spaces is known before it; at
    the beginning of a text there is none."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    prompt, answer = tokenizer.encode(Text("a b"), 10), tokenizer.encode(Text(" cab"), 10, continues=True)
    (special,) = tokenizer.eos
    assert "".join(pieces_of(tokenizer, answer, prompt=prompt)) == " cab"
    assert "".join(pieces_of(tokenizer, answer, [" ca"], prompt)) == ""
    assert "".join(pieces_of(tokenizer, answer, ["ab"], prompt)) == " c"
    assert "".join(pieces_of(tokenizer, answer, prompt=[*prompt, special])) == " cab"
    assert "".join(pieces_of(tokenizer, answer, prompt=tokenizer.encode(Text(" "), 10))) == " cab"
    assert "".join(pieces_of(tokenizer, answer, prompt=[special])) == "cab"


@pytest.mark.parametrize("name", ["byte_level", "default_model", *MARKING])
@pytest.mark.parametrize(("prompt", "continuation"), [("a", " cab"), ("a ", "cab"), ("a", ","), ("a", "  a")])
def test_a_continuation_has_the_tokens_that_it_has_behind_its_prompt(
    name: str, prompt: str, continuation: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    before = tokenizer.encode(Text(prompt), 100)
    tokens = tokenizer.encode(Text(continuation), 100, continues=True)
    assert tokenizer.decode(before + tokens) == prompt + continuation
    if before == tokenizer.encode(Text(prompt + continuation), 100)[: len(before)]:
        assert before + tokens == tokenizer.encode(Text(prompt + continuation), 100)


def test_a_prompt_that_ends_within_a_character_shows_none_of_it(byte_level: Tokenizer) -> None:
    whole = byte_level.encode(Text("a€"), 10)
    assert byte_level.ending(whole) == whole
    assert byte_level.ending(whole[:-1]) == []
    assert "".join(pieces_of(byte_level, [*whole[-1:], 65], prompt=whole[:-1])) == byte_level.decode(
        [*whole[-1:], 65]
    )


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices("ab ,é€你👍\u0301\u200d\n", k=rng.randrange(80)))


@pytest.mark.parametrize(
    "name", ["byte_level", "byte_fallback", "metaspace", "default_model", "decoded_again"]
)
@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_are_the_text(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(seed)
    text = TEXTS[seed] if seed < len(TEXTS) and name != "metaspace" else random_text(rng)
    tokens = tokenizer.encode(Text("a" + text), 1000)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces).endswith(text)


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "default_model", "decoded_again"])
@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_random_tokens_are_the_text(
    name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    """Words and parts of characters in any order, special tokens, and ids that the tokenizer does not know.
    Some sequences have only a few different tokens, which they repeat."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(seed)
    ids = range(49_152 if name == "default_model" else VOCABULARY + UNKNOWN)
    pool = rng.sample(ids, 3) if seed % 4 == 0 else ids
    tokens = rng.choices(pool, k=300)
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_between_words_that_are_no_characters(byte_fallback: Tokenizer, seed: int) -> None:
    """Replacement characters may differ from those of the whole text; words and spaces do not."""
    rng = random.Random(seed)
    words = [byte_fallback.encode(Text("a"), 10)[-1], *byte_fallback.encode(Text("b c"), 10)]
    pools = (range(129, 257), words, byte_fallback.encode(Text("€"), 10)[1:])  # 129 is byte 128
    tokens = [words[0], *(rng.choice(pool) for pool in rng.choices(pools, k=300))]
    found = "".join(pieces_of(byte_fallback, tokens))
    plain = [token for token in tokens if token in words]
    assert "".join(character for character in found if character in "abc ") == byte_fallback.decode(plain)


@pytest.mark.parametrize("seed", range(60))
def test_random_bytes_are_given_in_time_and_never_taken_back(byte_level: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    lead = [byte_level.encode(Text(c), 10)[0] for c in "é€你👍"]  # beginnings of characters
    pools = (range(VOCABULARY), lead, range(128, 256), range(100, 180))
    tokens = [rng.choice(rng.choice(pools)) for _ in range(120)]
    detokenizer, given, whole = Detokenizer(byte_level, [], []), "", byte_level.decode(tokens)
    for count, token in enumerate(tokens, 1):
        given += detokenizer.push(token)
        text = byte_level.decode(tokens[:count])
        assert len(given) >= len(text) - 4, "no more than one character's bytes are held back"
        assert whole.startswith(given)
    assert given + detokenizer.flush() == whole


def test_special_tokens_give_no_text_and_do_not_part_characters(byte_level: Tokenizer) -> None:
    start, end = byte_level.encode(Text("👍"), 10)[:2], byte_level.encode(Text("👍"), 10)[2:]
    special = byte_level.encode(Text(SPECIAL[0]), 10)
    assert len(special) == 1
    assert pieces_of(byte_level, [*start, *special, *end, *special]) == ["", "", "", "", "👍", "", ""]


@pytest.mark.parametrize("name", ["byte_level", "decoded_again", "byte_fallback", "metaspace"])
def test_each_token_can_be_spelled(name: str, request: pytest.FixtureRequest) -> None:
    """Together they are the text; what is part of a character is bytes, and special tokens have their
    names."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "ab a,é👍" if name == "metaspace" else "abc a é 👍"
    tokens = tokenizer.encode(Text(text), LIMIT)
    spelled = b"".join(map(tokenizer.spell, tokens))
    if name != "decoded_again":  # which has no bytes to show
        assert spelled.decode().strip() == text
    special = tokenizer.eos[0]
    assert tokenizer.spell(special).decode() == tokenizer.decode([special], special=True) != ""
    assert tokenizer.decode([*tokens, special]) == text
    assert tokenizer.decode([*tokens, special], special=True).startswith(text)
    assert tokenizer.spell(VOCABULARY + 1) == b""


def test_ids_that_the_tokenizer_does_not_know_give_no_text(byte_level: Tokenizer, smollm2: Path) -> None:
    """A model may have more tokens than its tokenizer, and may generate them."""
    rng = random.Random(8)
    for tokenizer, known in ((byte_level, VOCABULARY), (Tokenizer(smollm2, 128256), 49152)):
        tokens = [rng.randrange(known if rng.random() < 0.3 else 128256) for _ in range(300)]
        expected = tokenizer.decode([token for token in tokens if token < known])
        assert "".join(pieces_of(tokenizer, tokens)) == expected
        assert set(pieces_of(tokenizer, list(range(known, known + 200)))) == {""}


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of several, the longest."""
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)]
    return text


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["ee"], "one two thr"),
        ("one two three", ["four"], "one two three"),
        ("one two thr", ["three"], "one two thr"),  # only begun
        ("xaabaac", ["aac"], "xaab"),  # begun twice
        ("abababc", ["ababc"], "ab"),  # overlaps itself
        ("xabcd", ["abcd", "bc"], "xa"),  # the first that is complete, though another began before it
        ("xabcd", ["c", "abc"], "x"),  # both at once
        ("later first", ["first", "later"], ""),
        ("3 € and 4 €", ["€ and"], "3 "),
        ("👍👍🏽!", ["👍🏽"], "👍"),
    ],
)
def test_stop_strings(byte_level: Tokenizer, text: str, stops: list[str], expected: str) -> None:
    assert "".join(pieces_of(byte_level, byte_level.encode(Text(text), 100), stops)) == expected


@pytest.mark.parametrize("seed", range(100))
def test_stop_strings_at_random(byte_level: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("ab€", k=60))
    stops = ["".join(rng.choices("ab€", k=rng.randrange(1, 9))) for _ in range(rng.randrange(1, 5))]
    detokenizer, given, expected = Detokenizer(byte_level, [], stops), "", cut(text, stops)
    for token in byte_level.encode(Text(text), 100):
        given += detokenizer.push(token)
        assert expected.startswith(given)
    given += detokenizer.flush()
    assert given == expected
    assert detokenizer.stopped == (expected != text)


def test_only_what_may_begin_a_stop_string_is_held_back(byte_level: Tokenizer) -> None:
    tokens = [byte_level.encode(Text(character), 10)[0] for character in "12-3--4"]
    assert pieces_of(byte_level, tokens, ["--4", "4"]) == ["1", "2", "", "-3", "", "", "", ""]


def test_nothing_comes_behind_a_stop_string(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, [], ["b"])
    tokens = [byte_level.encode(Text(character), 10)[0] for character in "1b2"]
    assert [detokenizer.push(token) for token in tokens] == ["1", "", ""]
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


def test_a_stop_string_may_end_with_the_sequence(byte_level: Tokenizer) -> None:
    """The last bytes are no character, so that the flush alone shows them."""
    tokens = byte_level.encode(Text("ab€"), 10)[:-1]
    assert "".join(pieces_of(byte_level, tokens, ["b\ufffd"])) == "a"


@pytest.mark.parametrize(
    ("prompt", "error", "sentence"),
    [
        (Text(""), InvalidRequest, "prompt is empty"),
        (Tokens([]), InvalidRequest, "prompt is empty"),
        (Chat([]), InvalidRequest, "chat is empty"),
        (Tokens([0, 517]), InvalidRequest, "Token id 517 is not in the vocabulary; ids go up to 516"),
        (
            Text("x" * 100_000),
            PromptTooLong,
            "100000 characters cannot fit: this model's maximum context length is 100",
        ),
        (Chat([Turn("user", "x" * 100_000)]), PromptTooLong, "cannot fit"),
    ],
)
def test_prompts_that_are_refused(
    byte_level: Tokenizer, prompt: Text | Chat | Tokens, error: type[CLOError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        byte_level.encode(prompt, LIMIT)


def test_a_text_that_might_fit_is_read(byte_level: Tokenizer) -> None:
    """The longest token makes of this text far fewer tokens than characters."""
    text = "".join(SPECIAL[:1] * LIMIT)
    assert len(byte_level.encode(Text(text), LIMIT)) == LIMIT
    assert byte_level.encode(Tokens([VOCABULARY - 1]), LIMIT) == [VOCABULARY - 1]


def test_a_text_of_a_token_that_the_model_lacks_is_refused(tiny_model: Path) -> None:
    smaller = Tokenizer(tiny_model, VOCABULARY - len(SPECIAL))
    assert smaller.encode(Text("plain"), LIMIT)
    with pytest.raises(InvalidRequest, match="not in the vocabulary"):
        smaller.encode(Text(f"plain {SPECIAL[0]}"), LIMIT)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's tokenizer to change."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_model, tmp_path / "model", ignore=ignored))


def set_template(folder: Path, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)


def test_a_chat_is_rendered_as_by_transformers(tiny_model: Path, smollm2: Path) -> None:
    for path in (tiny_model, smollm2):
        reference = AutoTokenizer.from_pretrained(path)
        messages = [{"role": turn.role, "content": turn.content} for turn in HELLO.turns]
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert Tokenizer(path, len(reference)).encode(HELLO, 1000) == expected


CALL = ToolCall(Function("f", '{"x": [1, "é"]}'), id="1")
TEMPLATE_OF_EVERYTHING = "{{ messages | tojson }}{{ tools | tojson }}{{ enable_thinking }}"
OPENAI = [
    Turn("user", [TextPart("one"), TextPart("two")], name="n"),
    Turn("user", []),
    Turn("assistant", None, tool_calls=[CALL]),
    Turn("tool", None, tool_call_id="1"),
    Turn("assistant", "three", reasoning_content="hm"),
]


def test_content_is_null_or_parts_and_tool_calls_are_objects(folder: Path) -> None:
    """As vLLM hands them to a template; what a message lacks the template does not see."""
    set_template(folder, TEMPLATE_OF_EVERYTHING)
    tokenizer = Tokenizer(folder, VOCABULARY)
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = Chat(OPENAI, json.dumps({"tools": tools, "enable_thinking": False}))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "one\ntwo", "name": "n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "three", "reasoning_content": "hm"},
    ]
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(
        messages, tools, enable_thinking=False, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(tokenizer.encode(chat, 1000)) == expected


def test_a_variable_of_the_template_is_not_an_option_of_the_library(folder: Path) -> None:
    """A template of the client's own could compute for ever."""
    tokenizer = Tokenizer(folder, VOCABULARY)
    for name in ("chat_template", "tokenize", "continue_final_message", "add_generation_prompt", "padding"):
        with pytest.raises(InvalidRequest, match=f"cannot set '{name}'"):
            tokenizer.encode(Chat(HELLO.turns, json.dumps({name: "x"})), 1000)
    for name, value in (("messages", []), ("tools", 5), ("documents", [5])):
        with pytest.raises(InvalidRequest, match="refuses the messages"):
            tokenizer.encode(Chat(HELLO.turns, json.dumps({name: value})), 1000)
    assert tokenizer.encode(Chat(HELLO.turns, '{"unknown": 5}'), 1000) == tokenizer.encode(HELLO, 1000)


@pytest.mark.parametrize("text", ["{", "nonsense", "[]", "5", '{"a": ' + "[" * 50_000])
def test_what_is_not_an_object_in_json_is_refused(folder: Path, text: str) -> None:
    """Arguments of a tool call, and variables of the template."""
    tokenizer = Tokenizer(folder, VOCABULARY)
    call = Turn("assistant", None, tool_calls=[ToolCall(Function("f", text))])
    with pytest.raises(InvalidRequest, match="A tool call's arguments must be an object in JSON"):
        tokenizer.encode(Chat([call]), 1000)
    with pytest.raises(InvalidRequest, match="chat_template_kwargs must be an object in JSON"):
        tokenizer.encode(Chat(HELLO.turns, text), 1000)


def test_more_json_than_is_parsed_in_a_moment_is_refused(folder: Path) -> None:
    calls = [ToolCall(Function("f", json.dumps("x" * 400_000))) for _ in range(3)]
    tokenizer = Tokenizer(folder, VOCABULARY)
    with pytest.raises(InvalidRequest, match="1200006 characters and up to 0 values in all"):
        tokenizer.encode(Chat([Turn("assistant", None, tool_calls=calls)]), 1000)
    with pytest.raises(InvalidRequest, match="up to 100002 values in all"):
        tokenizer.encode(Chat(HELLO.turns, '{"a":[' + "0," * 100_000 + "0]}"), 1000)
    assert tokenizer.encode(Chat(HELLO.turns, '{"a":[' + "0," * 90_000 + "0]}"), 1000)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "no chat template"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
        ("{{ 'a' % 1 }}", "refuses the messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recursion"),
        ("{{ range(10 ** 9) }}", "refuses the messages"),
        ("{{ raise_exception('user must come first') }}", "refuses the messages: user must come first"),
        ("{{ messages[0].content.missing.part }}", "refuses the messages"),
        ("{% if %}", "refuses the messages"),
    ],
)
def test_chats_that_the_template_refuses(folder: Path, template: str | None, sentence: str) -> None:
    set_template(folder, template)
    tokenizer = Tokenizer(folder, VOCABULARY)
    with pytest.raises(InvalidRequest, match=sentence):
        tokenizer.encode(HELLO, 1000)
    assert tokenizer.encode(Text("plain"), LIMIT), "other prompts still work"


def test_special_tokens_are_added_to_texts_alone_and_only_when_asked(
    byte_fallback: Tokenizer, folder: Path
) -> None:
    """The tokenizer of Llama 3, for example, begins every text with one."""
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    bos = Tokenizer(folder, VOCABULARY).encode(Text("<|im_start|>"), LIMIT)
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {"<|im_start|>": {"id": "<|im_start|>", "ids": bos, "tokens": ["<|im_start|>"]}}
    written["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens,
    }  # fmt: skip
    path.write_text(json.dumps(written))
    tokenizer = Tokenizer(folder, VOCABULARY)
    plain = tokenizer.encode(Text("plain"), LIMIT, continues=True)
    assert tokenizer.encode(Text("plain"), LIMIT) == bos + plain
    assert tokenizer.encode(Text("plain"), LIMIT, special=False) == plain
    assert tokenizer.encode(Tokens(plain), LIMIT) == plain
    chat = tokenizer.encode(HELLO, LIMIT)
    assert chat[0] == bos[0] != chat[1], "the template has put its own"


@pytest.mark.parametrize(
    ("generation", "more"),
    [
        (None, []),
        ({}, []),
        ({"eos_token_id": None}, []),
        ({"eos_token_id": 7}, [7]),
        ({"eos_token_id": [9, 7]}, [7, 9]),
    ],
)
def test_texts_end_by_the_tokenizer_and_by_the_generation_config(
    folder: Path, generation: dict[str, object] | None, more: list[int]
) -> None:
    file = folder / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    tokenizer = Tokenizer(folder, VOCABULARY)
    end = tokenizer.encode(Text("<|im_end|>"), LIMIT)
    assert tokenizer.eos == sorted(more + end)
    assert pieces_of(tokenizer, [*tokenizer.eos, 65]) == [""] * len(tokenizer.eos) + [
        tokenizer.decode([65]),
        "",
    ]


@pytest.mark.parametrize(
    ("generation", "config", "more"),
    [
        (None, 7, [7]),
        (None, [9, 7], [7, 9]),
        ({"temperature": 0.5}, [9, 7], [7, 9]),
        ({"eos_token_id": 8}, [9, 7], [8]),
        (None, None, []),
    ],
)
def test_config_json_says_how_texts_end_where_generation_config_does_not(
    folder: Path, generation: dict[str, object] | None, config: object, more: list[int]
) -> None:
    """As for transformers and vLLM."""
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    tokenizer = Tokenizer(folder, VOCABULARY)
    assert tokenizer.eos == sorted({*more, *tokenizer.encode(Text("<|im_end|>"), LIMIT)})


DAMAGED = [
    "{",
    "[]",
    "\xff",
    "[" * 100_000,
    '{"eos_token_id": "end"}',
    '{"eos_token_id": [1, "end"]}',
    '{"eos_token_id": -1}',
    '{"eos_token_id": true}',
    '{"temperature": "hot"}',
    '{"temperature": -1}',
    '{"temperature": NaN}',
    '{"top_p": 0}',
    '{"top_k": 1.5}',
    '{"max_new_tokens": 0}',
    '{"min_p": 1.5}',
    '{"repetition_penalty": 0}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_generation_config_is_refused(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json is damaged"):
        Tokenizer(folder, VOCABULARY)


def damage(name: str, text: str | None) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink() if text is None else (folder / name).write_text(text)


def change(name: str, **entries: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(
        json.dumps(json.loads((folder / name).read_text()) | entries)
    )


def folder_in_place(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


FOLDERS: dict[str, Callable[[Path], object]] = {
    "no tokenizer": damage("tokenizer.json", None),
    "an empty one": damage("tokenizer.json", ""),
    "without a model": damage("tokenizer.json", "{}"),
    "cut short": damage("tokenizer.json", '{"model": {"type": "BPE"'),
    "an unknown model": change("tokenizer.json", model={"type": "Spell"}),
    "a folder in its place": folder_in_place,
    "settings cut short": damage("tokenizer_config.json", "{"),
    "settings that are a list": damage("tokenizer_config.json", "[]"),
    "an end that is a number": change("tokenizer_config.json", eos_token=5),
    "code of its own": change(
        "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_or_damaged_tokenizer_is_refused(folder: Path, name: str) -> None:
    """In one sentence that names the folder, and without a question about the model's own code."""
    FOLDERS[name](folder)
    with pytest.raises(
        ConfigError, match=r"tokenizer in .* cannot be loaded \(.*\); copy the model"
    ) as caught:
        Tokenizer(folder, VOCABULARY)
    assert "\n" not in str(caught.value)
