"""What the kernels cannot do is known before a model is loaded, from the numbers that the kernels use."""

import subprocess
import sys
from typing import Any

import pytest

from clo.kernels.launch import recorded
from clo.kernels.limits import (
    SHARED_BYTES,
    UPDATE_STATIC_BYTES,
    check_limits,
    longest_context,
    update_shared_bytes,
)
from tests.kernel_calls import SHAPES, Shape, Sizes, calls

DEFAULT: dict[str, Any] = {
    "head_dim": 128, "group": 4, "k": 128, "resident": 1024, "max_tokens": 8192, "block_tokens": 512
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_that_are_tested_pass_on_every_gpu(shape: Shape) -> None:
    for shared_bytes in SHARED_BYTES.values():
        for k, resident, max_tokens in (
            (128, 1024, 8192),
            (256, 2048, 2**20),
            (1, 1, 1),
            (1500, 4096, 70000),
        ):
            check_limits(shape.head_dim, shape.group, k, resident, max_tokens, 64, shared_bytes=shared_bytes)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"head_dim": 0}, "head_dim is 0, and the index needs a positive multiple of 4"),
        ({"head_dim": 66}, "head_dim is 66, and the index needs a positive multiple of 4"),
        (
            {"head_dim": 68, "tail": 16},
            "head_dim is 68, and a tail needs a multiple of 8; leave it .* --tail 0",
        ),
        ({"head_dim": 72}, "head_dim is 72, and the GPU kernels need a multiple of 16 of at most 256"),
        ({"head_dim": 272}, "head_dim is 272, and the GPU kernels need a multiple of 16 of at most 256"),
        (
            {"group": 97},
            "97 query heads share a KV head, and at head_dim 128 the GPU kernels take at most 96",
        ),
        ({"block_tokens": 96}, "A block has 96 tokens, and the GPU kernels need a positive multiple of 64"),
        ({"k": 0}, "A head selects 0 rows and keeps 1024; it must"),
        ({"k": 2000}, "A head selects 2000 rows and keeps 1024; it must"),
        ({"k": 4096, "resident": 32768}, "Selecting 4096 rows .* takes more than the 227 KiB"),
        ({"max_tokens": 2_000_000}, "a context of 1742848 tokens on the GPU, not of 2000000"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(changed: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_limits(**DEFAULT | changed)


def test_the_cpu_refuses_only_what_its_references_cannot_do() -> None:
    check_limits(
        **DEFAULT | {"head_dim": 20, "group": 200, "block_tokens": 8, "k": 5000, "resident": 50000},
        cuda=False,
    )
    for changed in ({"head_dim": 66}, {"k": 0}, {"k": 2000}):
        with pytest.raises(ValueError, match=r"must select at least one|needs a positive multiple"):
            check_limits(**DEFAULT | changed, cuda=False)


@pytest.mark.parametrize("shared_bytes", set(SHARED_BYTES.values()))
@pytest.mark.parametrize(("k", "capacity"), [(1, 1), (128, 1024), (256, 2048), (1000, 8000)])
def test_the_longest_context_is_the_last_whose_launch_fits(k: int, capacity: int, shared_bytes: int) -> None:
    longest = longest_context(k, capacity, shared_bytes)
    limits = {**DEFAULT, "k": k, "resident": capacity, "block_tokens": 64, "shared_bytes": shared_bytes}
    check_limits(**limits | {"max_tokens": longest})
    with pytest.raises(ValueError, match=f"a context of {longest} tokens"):
        check_limits(**limits | {"max_tokens": longest + 1})
    sizes = Sizes(batch=1, capacity=capacity, k=k, max_blocks=longest // 64)
    with recorded() as launches:
        calls(SHAPES[0], "meta", sizes)["update_resident"].run()
    assert launches[0].shared + UPDATE_STATIC_BYTES <= shared_bytes
    assert update_shared_bytes(k, capacity, longest) == launches[0].shared
    assert update_shared_bytes(k, capacity, longest + 1) + UPDATE_STATIC_BYTES > shared_bytes


def test_limits_are_known_without_torch() -> None:
    program = "import sys; import clo.kernels.limits; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
