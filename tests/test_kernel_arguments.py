"""Every operation refuses arguments that its kernel would read wrongly, with a sentence that names them."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, Argument, Signature
from clo.kernels.blocks import PromptBlocks
from clo.kernels.launch import recorded
from tests.kernel_calls import SHAPES, Call, Shape, Sizes, calls

SHAPE = Shape(head_dim=16, kv_heads=2, group=11, dtype=torch.float32)  # with `Sizes`, no two sizes are equal
CALLS = calls(SHAPE, "cpu")
NONE = torch.zeros(0, dtype=torch.int64)


def signature_of(call: Call) -> Signature:
    found = vars(sys.modules[call.function.__module__]).values()
    name = call.function.__name__
    return next(value for value in found if isinstance(value, Signature) and value.operation == name)


SIGNATURES = {name: signature_of(call) for name, call in CALLS.items()}
ARGUMENTS = [(name, argument) for name, signature in SIGNATURES.items() for argument in signature.arguments]
each_argument = pytest.mark.parametrize(
    ("operation", "argument"), ARGUMENTS, ids=[f"{name}-{argument.name}" for name, argument in ARGUMENTS]
)


def refused(operation: str, argument: Argument, value: Any, error: type[Exception] = ValueError) -> str:
    """The sentence with which the operation refuses this argument, after a valid call has passed."""
    call = CALLS[operation]
    call.run()
    with pytest.raises(error) as caught:
        call.with_argument(argument.name, value).run()
    sentence = str(caught.value)
    assert sentence.startswith(f"{operation}: ") and sentence.endswith(".") and "\n" not in sentence
    assert argument.name in sentence
    return sentence


@pytest.mark.parametrize("shape", SHAPES)
def test_valid_calls_pass_at_every_shape_on_cpu_and_gpu(shape: Shape) -> None:
    for call in calls(shape, "cpu").values():
        call.run()
    with recorded() as launches:
        for call in calls(shape, "meta").values():
            call.run()
    names = {launch.name for launch in launches}
    assert len(names) == len(launches) == len(CALLS) + 1, "one kernel each, and two to decode pages"


@each_argument
def test_another_dtype_is_refused(operation: str, argument: Argument) -> None:
    tensor: Tensor = CALLS[operation][argument.name]
    assert "is float64, and must be" in refused(operation, argument, tensor.double(), TypeError)
    elements = [other for other in SIGNATURES[operation].arguments if other.dtype is ELEMENT]
    if argument in elements and len(elements) > 1:
        refused(operation, argument, tensor.bfloat16(), TypeError)


@each_argument
def test_something_that_is_no_tensor_is_refused(operation: str, argument: Argument) -> None:
    tensor: Tensor = CALLS[operation][argument.name]
    if "." in argument.name or tensor.dim() == 2:  # elsewhere the function itself may look at it first
        refused(operation, argument, tensor.tolist(), TypeError)


@each_argument
def test_another_device_is_refused(operation: str, argument: Argument) -> None:
    tensor: Tensor = CALLS[operation][argument.name]
    assert "meta" in refused(operation, argument, tensor.to("meta"))


@each_argument
def test_transposed_arguments_are_refused(operation: str, argument: Argument) -> None:
    tensor: Tensor = CALLS[operation][argument.name]
    for dim in range(tensor.dim() - 1):
        refused(operation, argument, tensor.transpose(dim, dim + 1))


@each_argument
def test_missing_and_additional_dimensions_are_refused(operation: str, argument: Argument) -> None:
    tensor: Tensor = CALLS[operation][argument.name]
    refused(operation, argument, tensor.unsqueeze(0))
    refused(operation, argument, tensor[0])


@each_argument
def test_another_size_is_refused(operation: str, argument: Argument) -> None:
    call, tensor = CALLS[operation], CALLS[operation][argument.name]
    shapes = [other.shape.split() for other in SIGNATURES[operation].arguments if other != argument]
    others = {name for shape in shapes for size in shape for name in compile(size, "", "eval").co_names}
    others |= {name for name, value in call.arguments.items() if isinstance(value, int)}
    for dim, size in enumerate(argument.shape.split()):
        if size.isidentifier() and size not in others:
            continue  # no other argument has it, so it may be anything
        wrong = [*tensor.shape]
        wrong[dim] += 1
        refused(operation, argument, torch.zeros(wrong, dtype=tensor.dtype))


@each_argument
def test_gaps_are_refused_where_the_kernel_reads_in_order(operation: str, argument: Argument) -> None:
    tensor: Tensor = CALLS[operation][argument.name]
    dense = tensor.dim() if argument.dense is None else argument.dense
    for dim in range(tensor.dim() - dense, tensor.dim()):
        apart = tensor.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
        if tensor.shape[dim] > 1:
            assert "must be contiguous" in refused(operation, argument, apart)
    for dim in range(tensor.dim() - dense):
        apart = tensor.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
        CALLS[operation].with_argument(argument.name, apart).run()


@pytest.mark.parametrize(
    ("operation", "name", "value", "condition"),
    [
        ("update_resident", "k", 8,
         "1 <= k <= capacity must hold, because .*; k is 8 and capacity is 7 as in resident.positions"),
        ("update_resident", "k", 0, "1 <= k <= capacity"),
        ("update_resident", "latest", -1, "latest >= 0"),
        ("append", "resident.recent", 0, "resident.rows has the shape"),
        ("score_codes", "sinks", -1, "sinks >= 0"),
        ("encode_prompts", "prompt_blocks", PromptBlocks(*4 * [NONE]), "P >= 1"),
        ("post", "mailbox", torch.zeros(4, 3, dtype=torch.int64), "width > N"),
        ("wait", "number", 0, "number >= 1"),
        ("add_shares", "rank", 2, "0 <= rank < ranks"),
        ("add_shares", "meeting.met", torch.zeros(0, dtype=torch.int32), "blocks >= 1"),
        ("take_shares", "taken", torch.zeros(3, 4, dtype=torch.int64), "sources <= ranks"),
        ("gate", "query", torch.zeros(3, 23, 16), "query_heads % kv_heads == 0"),
    ],
)  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(
    operation: str, name: str, value: Any, condition: str
) -> None:
    with pytest.raises(ValueError, match=f"^{operation}: .*{condition}"):
        CALLS[operation].with_argument(name, value).run()


def test_queries_are_quantized_without_rope() -> None:
    CALLS["quantize_query"].with_argument("rope", None).run()


def test_rows_are_attended_without_a_fetch_list() -> None:
    for operation in ("attend_resident", "merge_fetched"):
        CALLS[operation].with_argument("fetch_list", None).run()


GPU_LIMITS = {
    "head_dim % 16 == 0 and head_dim <= 256 must hold on a GPU": [
        (Shape(head_dim, 2, 3, torch.float16), Sizes(), operation)
        for head_dim in (24, 72, 272)
        for operation in CALLS
        if operation not in ("update_resident", "sample", "take", "post", "wait", "add_shares", "take_shares")
    ],
    "vocab <= 2\\*\\*19 must hold on a GPU": [(SHAPE, Sizes(vocab=2**19 + 1), "sample")],
    "block_tokens % 64 == 0 must hold on a GPU": [(SHAPE, Sizes(block_tokens=32), "score_codes")],
    "T % 64 == 0 must hold on a GPU": [(SHAPE, Sizes(block_tokens=32, max_blocks=3), "update_resident")],
    "query_heads // kv_heads \\* head_dim <= 12288 must hold on a GPU": [
        (Shape(256, 1, 49, torch.float16), Sizes(), "quantize_query")
    ],
    "update_resident needs [0-9]+ bytes of shared memory": [
        (SHAPE, Sizes(k=4096, capacity=32768), "update_resident"),
        (SHAPE, Sizes(batch=1, block_tokens=512, max_blocks=4000), "update_resident"),
    ],
}


@pytest.mark.parametrize("sentence", GPU_LIMITS)
def test_what_only_a_gpu_cannot_do_is_refused_there_alone(sentence: str) -> None:
    for shape, sizes, operation in GPU_LIMITS[sentence]:
        calls(shape, "cpu", sizes)[operation].run()
        with pytest.raises(ValueError, match=sentence), recorded():
            calls(shape, "meta", sizes)[operation].run()


@pytest.mark.parametrize("operation", ["append", "store_new", "attend_resident"])
def test_rows_that_start_between_chunks_of_16_bytes_are_refused_on_a_gpu(operation: str) -> None:
    for device in ("cpu", "meta"):
        call = calls(SHAPE, device)[operation]
        name = "query" if operation == "attend_resident" else "kv"
        tensor: Tensor = call[name]
        wide = torch.zeros(len(tensor), tensor[0].numel() + 2, device=device)
        call = call.with_argument(name, wide[:, :-2].view(tensor.shape))
        if device == "cpu":
            call.run()
            continue
        with pytest.raises(ValueError, match=f"{name} has strides .* multiples of 16 bytes"), recorded():
            call.run()


def test_a_recording_ends_with_its_context() -> None:
    with recorded() as outer:
        with recorded() as inner:
            calls(SHAPE, "meta")["gate"].run()
        assert [launch.name for launch in inner] == ["gate"] and not outer
        calls(SHAPE, "meta")["append"].run()
        assert [launch.name for launch in outer] == ["append"]
