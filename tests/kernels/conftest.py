from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from places import pytest_generate_tests, run_interpreted  # noqa: F401

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a block of threads may have, by compute capability


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small calls: where other processes hold the cores, threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SHARED_BYTES)
def compile_for_gpu(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Compiles a kernel of triton.jit for a GPU that need not be there; returns what the compiler made.

    Types and control flow are checked by the compiler only: the interpreter lets pass what it refuses.
    """
    triton = pytest.importorskip("triton")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", request.param, 32)

    def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], attributes: Any = None) -> Any:
        """types: of arguments that are no i32; constants: by name, the kernel's `constexpr`s among them."""
        names = kernel.arg_names
        constants = {name: value for name, value in constants.items() if name in names}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        made = triton.compile(triton.compiler.ASTSource(kernel, signature, constants, attributes), target=target)
        assert "cubin" in made.asm
        assert made.metadata.shared <= SHARED_BYTES[request.param]
        return made

    return compiled
