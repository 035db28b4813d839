"""Kernels are made on first use, whichever thread that is in; which products a device has."""

import platform
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from swiftkv_kernels import backends
from swiftkv_kernels.backends import made_once, multiplies_natively


def test_threads_that_ask_at_once_get_one():
    barrier, made = threading.Barrier(4), []

    @made_once
    def make():
        """It."""
        time.sleep(0.05)  # as an import takes
        made.append(object())
        return made[-1]

    def ask(_):
        barrier.wait()
        return make()

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ask, range(4))) == {made[0]}
    assert len(made) == 1
    assert make.__doc__ == "It."


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="the flags of another processor"
)
def test_a_cpu_has_the_products_that_its_flags_promise():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    assert multiplies_natively(torch.float32, "cpu")
    if "avx_ne_convert" not in flags:  # of which oneDNN's versions make different things
        assert multiplies_natively(torch.bfloat16, "cpu") == (flags >= {"avx512bw", "avx512vl", "avx512dq"})


def test_a_torch_without_onednn_has_no_16_bit_products(monkeypatch):
    def missing():
        raise RuntimeError("not compiled with oneDNN")

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", missing)
    assert not multiplies_natively(torch.bfloat16, "cpu")


def test_a_gpu_that_is_not_there_has_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert multiplies_natively(torch.bfloat16, "cuda")


def test_an_old_gpu_has_fp16_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_natively(torch.bfloat16, "cuda")
    assert multiplies_natively(torch.float16, "cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere triton brings what it needs")
@pytest.mark.parametrize("lacking", ["triton", "compiler", "headers", ""])
def test_without_what_triton_builds_with_torch_runs_instead(monkeypatch, tmp_path, recwarn, lacking):
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backends, "_can_compile", backends._can_compile.__wrapped__)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if lacking == "triton" else object())
    monkeypatch.setattr("shutil.which", lambda name: "/bin/gcc" if name == "gcc" and lacking != "compiler" else None)
    include = tmp_path / "none" if lacking == "headers" else tmp_path
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(include)})
    assert backends.device_backend("cuda") == ("torch" if lacking else "triton")
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (lacking in ("compiler", "headers"))
    assert all("triton's kernels need" in text and "torch run instead" in text for text in said)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="where the system tells what the processor has")
@pytest.mark.parametrize("feature", ["avx2", "avx512_bf16", "amx_tile"])
def test_what_the_processor_has_is_seen(feature):
    if not hasattr(torch.cpu, f"_is_{feature}_supported"):
        pytest.skip("this torch does not tell")
    flags = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    assert backends.cpu_supports(feature) == any(feature in line.split() for line in flags)
