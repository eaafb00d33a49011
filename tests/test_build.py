"""The builder, run for real on tiny sources; torch's headers are read, torch is not imported."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from smis_kernels import build, info
from smis_kernels.runtime import native
from tools import headers, kernel_report

CPU = """
#include <torch/csrc/stable/library.h>
#include "cpu_kernel.h"
extern "C" __attribute__((visibility("default"))) int answer() { return tiny_best()(20); }
"""
HEADER = """
#include "../common/isa.h"
namespace smis::baseline { int tiny(int x); }
inline auto tiny_best() { return &smis::baseline::tiny; }
"""
KERNEL = """
#include "cpu_kernel.h"
namespace smis::SMIS_ISA { int tiny(int x) { return 2 * x + EXTRA; } }
"""
HOST_COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(HOST_COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """(package, csrc) with one op, and an environment that selects nothing."""
    for name in ("SMIS_BUILD", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    package, source = tmp_path / "package", tmp_path / "csrc"
    package.mkdir()
    (source / "tiny").mkdir(parents=True)
    (source / "common").mkdir()
    (source / "common" / "isa.h").write_text("#pragma once\n")
    (source / "tiny" / "cpu.cpp").write_text(CPU)
    (source / "tiny" / "cpu_kernel.h").write_text("#pragma once\n#define EXTRA 2\n" + HEADER)
    (source / "tiny" / "cpu_kernel.cpp").write_text(KERNEL)
    return package, source


def run(project, torch, **kwargs):
    lines = []
    record = build.build(*project, torch, say=lines.append, **kwargs)
    assert record == json.loads((project[0] / build.RECORD).read_text())
    return record, lines


def answer(package):
    """Call the library in a fresh process: this one would keep the first version loaded."""
    code = "import torch, ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"
    path = str(package / "_cpu.abi3.so")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


def test_finds_the_torch_that_is_imported():
    import torch

    found = build.find_torch()
    assert found is not None
    assert found.version == torch.__version__
    assert found.root == Path(torch.__file__).parent


def test_no_torch(project):
    record, lines = run(project, None)
    for name in build.LIBRARIES:
        assert record[name]["state"] == "not built"
        assert "torch is not installed" in record[name]["reason"]
        assert record[name]["cure"] == f"pip install torch && {build.COMMAND}"
    assert [line.partition(":")[0] for line in lines[-2:]] == ["cpu", "cuda"]
    assert sorted(p.name for p in project[0].iterdir()) == [build.RECORD]


def test_no_torch_message_of_the_package():
    """Without torch, ``python -m smis_kernels.build`` says so in one line."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "smis_kernels.build"], capture_output=True, text=True,
        cwd=Path(build.__file__).parent.parent,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install torch" in done.stderr


def test_old_torch(project):
    record, _ = run(project, build.Torch(Path("torch"), "2.9.1"))
    assert record["cpu"]["reason"] == "torch 2.9.1 is older than 2.10"


def test_no_compiler(project, no_compiler):
    record, _ = run(project, build.find_torch())
    assert record["cpu"]["reason"] == "no C++ compiler (g++ or clang++)"
    assert record["cuda"]["reason"] == "no CUDA compiler (nvcc)"
    for name in build.LIBRARIES:
        assert build.COMMAND in record[name]["cure"]


@pytest.mark.parametrize(
    ("variable", "library"), [("CXX", "cpu"), ("CUDACXX", "cuda"), ("CUDA_HOME", "cuda")]
)
def test_named_compiler_is_never_replaced(project, monkeypatch, tmp_path, variable, library):
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    record, _ = run(project, build.find_torch())
    assert record[library]["state"] == "not built"
    assert str(tmp_path / "nowhere") in record[library]["reason"]


@pytest.mark.parametrize(("choice", "left_out"), [("none", ["cpu", "cuda"]), ("cuda", ["cpu"])])
def test_selection(project, monkeypatch, no_compiler, choice, left_out):
    monkeypatch.setenv("SMIS_BUILD", choice)
    record, _ = run(project, build.find_torch())
    said = [n for n in build.LIBRARIES if record[n]["reason"] == f"SMIS_BUILD={choice} left it out"]
    assert said == left_out


def test_selection_is_checked(project, monkeypatch):
    monkeypatch.setenv("SMIS_BUILD", "gpu")
    with pytest.raises(SystemExit, match="expected none, cpu, cuda or all; got 'gpu'"):
        run(project, None)


@needs_compiler
def test_build_rebuild_and_failure(project, monkeypatch, tmp_path):
    """What changed is compiled again, and a source that is broken keeps the working library."""
    package, source = project
    monkeypatch.setenv("SMIS_BUILD", "cpu")
    torch, cache = build.find_torch(), tmp_path / "cache"
    record, _ = run(project, torch, cache=cache)
    assert record["cpu"]["state"] == "built", record["cpu"]
    assert record["cpu"]["isa"].split() == list(build.INSTRUCTION_SETS)
    assert answer(package) == 42

    objects = sorted(cache.glob("*.o"))
    _, lines = run(project, torch, cache=cache)
    assert not [line for line in lines if line.startswith("  ")]
    assert sorted(cache.glob("*.o")) == objects

    header = source / "tiny" / "cpu_kernel.h"
    header.write_text(header.read_text().replace("EXTRA 2", "EXTRA 3"))
    run(project, torch, cache=cache)
    assert answer(package) == 43
    assert len(list(cache.glob("*.o"))) == len(objects)

    (source / "tiny" / "cpu_kernel.cpp").write_text(KERNEL + "int broken = missing_name;\n")
    record, lines = run(project, torch, cache=cache)
    assert record["cpu"]["state"] == "not built"
    assert "error" in record["cpu"]["reason"]
    assert "missing_name" in record["cpu"]["reason"]
    assert "missing_name" in record["cpu"]["output"]
    assert lines[-2].startswith("cpu: not built: ")
    assert answer(package) == 43
    assert sorted(p.name for p in package.iterdir()) == ["_build_record.json", "_cpu.abi3.so"]


@needs_compiler
def test_a_kernel_that_one_instruction_set_lacks_is_a_link_error(project, monkeypatch):
    monkeypatch.setenv("SMIS_BUILD", "cpu")
    (project[1] / "tiny" / "cpu_kernel.cpp").write_text("")
    record, _ = run(project, build.find_torch())
    assert record["cpu"]["state"] == "not built"
    assert "tiny" in record["cpu"]["output"]


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("9.0", ["arch=compute_90,code=sm_90"]),
        ("7.5", ["arch=compute_75,code=sm_75"]),
        ("8.6;9.0a+PTX", ["arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a",
                          "arch=compute_90a,code=compute_90a"]),
    ],
)
def test_architecture_list(monkeypatch, wanted, flags):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    found = [flag for arch in build.architectures("nvcc") for flag in build.gencode(arch)]
    assert found == [f"-gencode={flag}" for flag in flags]


def test_architecture_list_is_checked(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.NotBuilt, match="expected numbers such as"):
        build.architectures("nvcc")


def test_default_architectures_end_in_ptx(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    assert build.architectures(str(nvcc)) == ("8.0", "9.0+PTX")


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler of CUDA 13.0 that knows sm_75 and sm_80, and refuses every source."""
    path = tmp_path / "nvcc"
    path.write_text(NVCC)
    path.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(path))
    return path


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *--list-gpu-code*) echo sm_75; echo sm_80 ;;
  *) echo 'In file included from a.cu:1:'
     echo 'cuda.h(30): error: identifier "NEWER_MACRO" is undefined'
     echo 'cuda.h(31): error: a second one'
     exit 2 ;;
esac
"""


@needs_compiler
@pytest.mark.parametrize(("cuda", "fits"), [("12.8", False), ("13.2", True), ("", True)])
def test_nvcc_of_another_cuda_than_torch(project, nvcc, cuda, fits):
    torch = dataclasses.replace(build.find_torch(), cuda=cuda)
    (project[1] / "tiny" / "cuda.cu").touch()
    if fits:
        assert build.plan_cuda(project[1], torch).facts["cuda"] == "13.0"
        return
    with pytest.raises(build.NotBuilt) as told:
        build.plan_cuda(project[1], torch)
    assert told.value.reason.startswith("nvcc is of CUDA 13.0 and torch of CUDA 12.8: ")
    assert told.value.cure == f"set CUDA_HOME to a CUDA 12 toolkit, then {build.COMMAND}"


@needs_compiler
def test_architectures_reach_the_compiler_and_the_record(project, nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    (project[1] / "tiny" / "cuda.cu").touch()
    plan = build.plan_cuda(project[1], dataclasses.replace(build.find_torch(), cuda=""))
    assert plan.facts["architectures"] == "7.5"
    assert re.findall(r"-gencode=(\S+)", plan.ninja) == ["arch=compute_75,code=sm_75"]


@needs_compiler
def test_info_names_a_library_that_did_not_build(project, nvcc, monkeypatch):
    """Which, the compiler's first error, and the command; the ops' other kernels stay."""
    import torch

    package, source = project
    (source / "tiny" / "cuda.cu").touch()
    monkeypatch.setenv("SMIS_BUILD", "cuda")
    monkeypatch.delenv("SMIS_CUDA_EMULATED", raising=False)
    run(project, dataclasses.replace(build.find_torch(), cuda=""))
    monkeypatch.setattr(native, "PACKAGE", package)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    before = info.info()["ops"]
    monkeypatch.setitem(native.STATUS, "cuda", native._load("cuda"))
    found = info.info()
    why = ('cuda.h(30): error: identifier "NEWER_MACRO" is undefined; '
           f"cure: {build.COMMAND} shows the whole message")
    lines = [line.split(None, 1) for line in info.report(found).splitlines()]
    assert ["cuda", f"missing: {why}"] in lines
    assert ["cuda", f"build  not built: {why}"] in lines
    assert ["cuda", f"the native cuda library is not loaded: {why}"] in lines
    for op, kinds in found["ops"].items():
        assert {k: v for k, v in kinds.items() if k != "cuda"} == {
            k: v for k, v in before[op].items() if k != "cuda"}


def wheel(folder, version, cuda):
    """A file that pip takes for torch's wheel."""
    info_dir = f"torch-{version}.dist-info"
    files = {
        "torch/version.py": f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n",
        "torch/include/torch/a.h": "", "torch/lib/libtorch.so": "large", "torch/__init__.py": "",
        f"{info_dir}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info_dir}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info_dir}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_headers_are_fetched_once_and_are_of_a_cuda_build(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel(tmp_path, "2.10.0", "12.8")
    wheel(tmp_path, "2.10.1", None)
    cache = tmp_path / "cache"
    for _ in range(2):
        found = headers.headers("2.10.0", cache)
        assert (found.version, found.cuda) == ("2.10.0", "12.8")
        kept = sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())
        assert kept == ["2.10.0/torch/include/torch/a.h", "2.10.0/torch/version.py"]
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"^headers: torch 2\.9\.9 could not .*: ERROR: [^\n]+$"):
        headers.headers("2.9.9", cache)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"CUDA build of torch 2\.10\.1, got torch 2\.10\.1 wi"):
        headers.headers("2.10.1", cache)


def test_later_build_is_enlisted_for_uninstalling(tmp_path):
    package, listed = tmp_path / "smis_kernels", tmp_path / "smis_kernels-0.1.0.dist-info"
    package.mkdir()
    listed.mkdir()
    (package / "_cpu.abi3.so").touch()
    (listed / "RECORD").write_text("smis_kernels/__init__.py,,\n")
    for _ in range(2):
        build._enlist(package)
    expected = "smis_kernels/__init__.py,,\nsmis_kernels/_cpu.abi3.so,,\n"
    assert (listed / "RECORD").read_text() == expected


PTXAS = """\
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_80'
ptxas info    : Function properties for _Z5firstv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90'
ptxas info    : Function properties for _Z6secondv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers
"""


def test_kernel_report_reads_ptxas_and_refuses_spills():
    first, second = kernel_report.parse_ptxas("op", PTXAS)
    assert first == kernel_report.Usage("op", "_Z5firstv", "sm_80", 255, 1024, 16, 12)
    assert second == kernel_report.Usage("op", "_Z6secondv", "sm_90", 10, 0, 0, 0)
    assert kernel_report.refused([first, second], {}) == [first]
    assert kernel_report.refused([first], {"op/*/sm_80": "measured faster"}) == []
    assert kernel_report.refused([first], {"op/*/sm_90": "another architecture"}) == [first]


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert build.jobs() == os.cpu_count()


PTX = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd3, %rd4 }, [ %rd2 + 0 ];
    @%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd5 + 0 ], 0x10, %r6;
    st.global.v2.b32 [ %rd7 + 0 ], { %r8, %r9 };
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r7 ];
    wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%f1}, %r1, %rd1, p, 1, 1;
"""


def test_kernel_report_reads_ptx_and_refuses_another_product():
    assert kernel_report.accesses(PTX, "ld") == "16:3 2:1"
    assert kernel_report.accesses(PTX, "st") == "8:1"
    assert kernel_report.products(PTX) == ("tf32",)
    bf16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}"
    assert kernel_report.products(bf16) == ("bf16",)
    assert kernel_report.products("tcgen05.mma.cta_group::1.kind::f16 [%r1]") == ("f16",)
    kernel_report.check_products("op/case/sm_90", "tf32", [PTX, ""])
    kernel_report.check_products("op/case/sm_90", "", [""])
    for declared, ptx in (("bf16", PTX), ("tf32", ""), ("", bf16), ("f16", bf16)):
        with pytest.raises(ValueError, match="op/case/sm_90: expected products"):
            kernel_report.check_products("op/case/sm_90", declared, [ptx])


@pytest.mark.parametrize(("triton", "numpy", "fails"), [
    ("3.6.0", "2.5.0", True), ("3.6.1", "2.4.0", True), ("3.6.0", "2.3.5", False),
    ("3.7.0", "2.5.0", False), ("3.10.0", "2.4.6", False),
])
def test_triton_and_numpy_that_do_not_interpret(triton, numpy, fails, monkeypatch):
    from smis_kernels.runtime import backend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    if importlib.util.find_spec("triton") is not None:
        assert ("cure: pip install 'numpy<2.4'" in (backend.missing("triton") or "")) == fails
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "numpy" not in (backend.missing("triton") or "")


def test_files_of_earlier_builds_are_left_out(tmp_path):
    """setuptools keeps them in its folder, from which a wheel is made."""
    old = [tmp_path / "lib" / package / "removed.py" for package in ("smis_kernels", "smis_models")]
    for path in old:
        path.parent.mkdir(parents=True)
        path.touch()
    command = (sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "lib"))
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True,
                   env={**os.environ, "SMIS_BUILD": "none"})
    assert [path for path in old if path.exists()] == []
    assert (tmp_path / "lib/smis_models/__init__.py").exists()
