"""`megamoe doctor`: whatever is installed, and however it is broken, it says so and ends."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megamoe
from megamoe import __main__ as command
from megamoe.doctor.child import cause, scrub
from megamoe.doctor.component import OPTIONAL, PYTHON_AT_LEAST, PYTHON_BELOW, REQUIREMENTS
from megamoe.doctor.diagnosis import Found, diagnose, is_broken
from megamoe.doctor.machine import Machine, driver_version, this_machine
from megamoe.doctor.probe import probe_all
from megamoe.doctor.show import as_json, as_text

ROOT = Path(megamoe.__file__).parent.parent
CANARY = "canary-7f3a91"
LIMIT_S = 60.0  # far more than a child needs
GPU = {"name": "NVIDIA H200", "memory_bytes": 150_754_820_096, "capability": "9.0"}

HEALTHY = {
    "nvidia-smi": {"absent": True},
    "compiler": {"version": "12.2.0"},
    "torch": {"version": "2.13.0+cpu"},
    "Megatron-core": {"version": "0.16.1"},
    "numpy": {"version": "2.4.6"},
    "rich": {"version": "15.0.0"},
    "torch-build": {"cuda": None, "nccl": None, "kernels_for": []},
    "gpus": {"gpus": []},
    "engine": {},
    **{item.name: {"absent": True} for item in OPTIONAL},
}
ON_GPUS = {
    **HEALTHY,
    "nvidia-smi": {"gpus": [GPU, GPU], "driver": "570.86.10"},
    "torch": {"version": "2.13.0+cu128"},
    "torch-build": {"cuda": "12.8", "nccl": "2.28.3", "kernels_for": ["sm_90"]},
    "gpus": {"gpus": [{**GPU, "broken": None}, {**GPU, "broken": None}]},
    "Transformer Engine": {"version": "2.10.0"},
}


def diagnosis(facts=HEALTHY, python="3.11.7", **changes):
    return diagnose(
        Found(
            megamoe="0.1.0",
            commit="0123abc",
            python=python,
            machine=Machine(system="Linux 6.1 x86_64", num_cpus=2, memory_bytes=8_200_000_000),
            driver=None,
            facts={**facts, **changes},
        )
    )


def write_package(folder: Path, name: str, body: str) -> None:
    """Write a package, or a module inside one: 'torch', 'megamoe.mcore.cpu'."""
    inner = folder.joinpath(*name.split("."))
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text(body, encoding="utf-8")


def probe_package(name: str, *, limit_s: float = LIMIT_S):
    return probe_all({"it": ("import", name, f"no-such-{name}")}, limit_s=limit_s, at_once=1)["it"]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


# One package, in a child process.


def test_a_package_that_is_not_installed_is_absent():
    assert probe_package("no_such_package") == {"absent": True}


def test_a_package_that_is_installed_tells_its_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_package(tmp_path, "works", "print('a banner')\n__version__ = '1.2+cu128'\n")
    write_package(tmp_path, "silent", "")
    write_package(tmp_path, "odd", "__version__ = 'one, built in /home/somebody'\n")
    assert probe_package("works") == {"version": "1.2+cu128"}
    assert probe_package("silent") == {"version": None}
    assert probe_package("odd") == {"version": None}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "raise ImportError('libfour.so.4:\\n cannot open')",
            "ImportError: libfour.so.4: cannot open",
        ),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import os; os._exit(3)", "ended the process with exit code 3"),
        ("import os; os.closerange(3, 64)", "ended the process with exit code 1"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_a_broken_package_is_reported_in_one_line(body, said, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_package(tmp_path, "breaks", body)
    facts = probe_package("breaks")
    assert facts["broken"].startswith(said)
    assert "\n" not in facts["broken"]


def test_a_package_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = tmp_path / "pid"
    write_package(
        tmp_path,
        "hangs",
        "import os, pathlib, time\n"
        "if pid := os.fork():\n"
        f"    pathlib.Path({str(started)!r}).write_text(str(pid))\n"
        "time.sleep(600)\n",
    )
    assert probe_package("hangs", limit_s=1.5) == {"broken": "did not end within 1.5 s"}
    for _ in range(500):  # the kernel takes a moment
        if not is_running(int(started.read_text())):
            return
        time.sleep(0.02)
    raise AssertionError("it still runs")


def test_a_package_that_leaves_a_process_behind_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    body = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\n__version__ = '1.0'\n"
    write_package(tmp_path, "forks", body)
    assert probe_package("forks") == {"version": "1.0"}


def test_a_part_of_another_package_that_lacks_what_it_needs_is_absent(tmp_path, monkeypatch):
    # flash-attn 2 brings a folder `cute` that is flash-attn 4, without what that needs.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_package(tmp_path, "outer", "")
    write_package(tmp_path, "outer.part", "import no_such_package\n")
    assert probe_package("outer.part") == {"absent": True}
    assert probe_package("outer.other") == {"absent": True}


def fake_nvidia_smi(folder: Path, *rows: str) -> None:
    """Write a program that answers as the driver's does."""
    folder.mkdir()
    script = "\n".join(["#!/bin/sh", "cat <<'END'", *rows, "END", ""])
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(
    ("said", "memory_bytes", "shown"),
    [
        ("143771", 143_771 * 2**20, "NVIDIA GB10, 150.8 GB, compute capability 12.1"),
        ("[N/A]", None, "NVIDIA GB10, memory unknown, compute capability 12.1"),
        ("[Not Supported]", None, "NVIDIA GB10, memory unknown, compute capability 12.1"),
    ],
)
def test_a_gpu_whose_memory_the_driver_does_not_count_is_a_gpu(
    said, memory_bytes, shown, tmp_path, monkeypatch
):
    fake_nvidia_smi(tmp_path / "bin", f"NVIDIA GB10, {said}, 12.1, 580.95.05")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    [facts] = probe_all({"smi": ("nvidia-smi",)}, limit_s=LIMIT_S, at_once=1).values()
    gpu = {"name": "NVIDIA GB10", "memory_bytes": memory_bytes, "capability": "12.1"}
    assert facts == {"gpus": [gpu], "driver": "580.95.05"}
    found = diagnosis(**{"nvidia-smi": facts})
    assert [problem.what for problem in found.problems] == ["torch is a CPU build and sees no GPU"]
    assert shown in as_text(found)
    assert json.loads(as_json(found))["gpus"][0]["memory_bytes"] == memory_bytes


# What is said is fit to be shown.


def test_no_value_of_the_environment_and_no_folder_is_said(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", CANARY)
    monkeypatch.setenv("MY_FOLDERS", "/home/jane doe/lib:/opt/jane")
    monkeypatch.setenv("USER", "jd")
    text = cause(
        ImportError(
            f"cannot import 'x' from 'y' (/home/mary/.venv/lib/y.py) {CANARY} "
            "/home/jane doe/lib/libz.so by jd in ~/jd/lib or ./here/libq.so, adjusted"
        )
    )
    assert text == (
        "ImportError: cannot import 'x' from 'y' (y.py) <hidden> libz.so by <hidden> in lib or "
        "libq.so, adjusted"
    )


def test_words_stay_words():
    assert scrub("needs CUDA 12.8 and/or cuDNN 9.1") == "needs CUDA 12.8 and/or cuDNN 9.1"


# The judgement.


def test_a_healthy_machine_without_a_gpu_trains_on_cpu():
    found = diagnosis()
    assert (found.can, found.problems, is_broken(found)) == ("train_on_cpu", (), False)


def test_gpus_are_counted():
    found = diagnosis(ON_GPUS)
    assert (found.can, found.problems) == ("train_on_gpus", ())
    assert "2 GPUs" in found.verdict
    assert (found.cuda_runtime, found.nvidia_driver, found.nccl) == ("12.8", "570.86.10", "2.28.3")
    one = [{**GPU, "broken": None}, {**GPU, "broken": "AcceleratorError: out of memory"}]
    ill = diagnosis(ON_GPUS, gpus={"gpus": one})
    assert "on CPU or 1 GPU;" in ill.verdict
    assert "GPU 1 does not compute: AcceleratorError" in ill.problems[0].what


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch-build": HEALTHY["torch-build"], "gpus": {"gpus": []}}, "torch is a CPU build"),
        ({"gpus": {"gpus": []}}, "torch sees none of the GPUs"),
        ({"gpus": {"broken": "ended by SIGSEGV"}}, "the driver lists (ended by SIGSEGV)"),
    ],
)
def test_gpus_that_torch_does_not_see_are_a_problem(changes, said):
    found = diagnosis(ON_GPUS, **changes)
    assert found.can == "train_on_cpu"
    assert said in found.problems[0].what
    assert len(found.gpus) == 2


def test_without_what_training_needs_a_machine_plans():
    absent = {"absent": True}
    names = ("torch", "torch-build", "gpus", "Megatron-core", "engine")
    found = diagnosis(**dict.fromkeys(names, absent))
    assert (found.can, is_broken(found), len(found.problems)) == ("plan", False, 1)
    assert "torch and Megatron-core, which are not installed" in found.problems[0].what


@pytest.mark.parametrize("name", ["torch", "Megatron-core", "numpy", "rich", "engine"])
def test_what_training_needs_must_not_be_broken(name):
    found = diagnosis(**{"engine": {"absent": True}, name: {"broken": "ended by SIGABRT"}})
    assert (found.can, is_broken(found), len(found.problems)) == ("plan", True, 1)
    assert "ended by SIGABRT" in found.problems[0].what


@pytest.mark.parametrize("item", OPTIONAL, ids=lambda item: item.name)
def test_what_is_optional_may_be_broken(item):
    found = diagnosis(**{item.name: {"broken": "ImportError: no"}})
    assert (found.can, is_broken(found)) == ("train_on_cpu", False)
    assert found.problems[0].what == f"{item.name} is broken: ImportError: no"
    assert item.instead in found.problems[0].remedy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"python": "3.13.0"}, "Python 3.13.0 is not one"),
        ({"torch": {"version": "2.10.1"}}, "torch 2.10.1 is not one"),
        ({"Megatron-core": {"version": "0.20.0"}}, "Megatron-core 0.20.0 is not one"),
        ({"Megatron-core": {"version": "0.16.0"}}, "Megatron-core 0.16.0 is not one"),
        ({"compiler": {"absent": True}}, "no C++ compiler"),
        ({"nvidia-smi": {"broken": "nvidia-smi: no device"}}, "driver does not answer"),
    ],
)
def test_what_may_go_wrong_is_a_problem_with_a_remedy(changes, said):
    found = diagnosis(**changes)
    assert found.can == "train_on_cpu"
    assert said in found.problems[0].what
    assert found.problems[0].remedy


def test_the_versions_are_those_of_setup():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    torch, megatron = REQUIREMENTS[:2]
    low, high = (".".join(map(str, bound)) for bound in (megatron.at_least, megatron.below))
    python = [".".join(map(str, bound)) for bound in (PYTHON_AT_LEAST, PYTHON_BELOW)]
    assert f'"torch>={".".join(map(str, torch.at_least))}"' in text
    assert f'"megatron-core>={low},<{high}"' in text
    assert f'python_requires=">={python[0]},<{python[1]}"' in text


# What is printed.


def leaves(value) -> list[object]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


@pytest.mark.parametrize(
    "facts",
    [
        HEALTHY,
        ON_GPUS,
        {**ON_GPUS, "triton": {"broken": "ended by SIGSEGV"}, "compiler": {"absent": True}},
        {**HEALTHY, "torch": {"broken": "ImportError: no"}, "engine": {"absent": True}},
    ],
)
def test_json_and_text_say_the_same(facts):
    found = diagnosis(facts)
    text = " ".join(as_text(found).split())
    printed = json.loads(as_json(found))
    ability = printed.pop("can")
    assert {"train_on_gpus": "GPUs", "train_on_cpu": "on CPU", "plan": "not train"}[ability] in text
    for leaf in leaves(printed):
        if isinstance(leaf, str) and leaf != "present":
            assert leaf in text, leaf
        elif isinstance(leaf, int) and leaf > 1_000_000:
            assert f"{leaf / 1e9:,.1f} GB" in text
    assert text.count("not used by this version;") == sum(
        not item["used_by_this_version"] for item in printed["optional"]
    )
    assert text.count("problem: ") == len(printed["problems"])
    assert json.loads(as_json(found)) == json.loads(json.dumps(dataclasses.asdict(found)))


def test_the_text_fits_and_ends_with_the_verdict():
    long = {"broken": "ImportError: " + "word " * 30}
    lines = as_text(diagnosis(ON_GPUS, apex=long)).splitlines()
    assert max(map(len, lines)) <= 96
    assert all(line == line.rstrip() and line.isascii() for line in lines)
    assert any(line.startswith("problem: apex is broken: ImportError: word") for line in lines)
    assert lines[-2].startswith("verdict: ")


def test_this_machine_has_cores_and_memory():
    machine = this_machine()
    assert 1 <= machine.num_cpus <= (os.cpu_count() or 1)
    assert machine.memory_bytes is None or machine.memory_bytes > 2**28
    assert os.uname().nodename not in machine.system


def test_the_driver_is_read_where_it_is(tmp_path):
    path = tmp_path / "version"
    assert driver_version(path) is None
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release\n")
    assert driver_version(path) == "570.86.10"


# The command, with a package of each name that fails, so that nothing heavy is imported.


@pytest.fixture
def shadows(tmp_path, monkeypatch) -> Path:
    names = {item.modules[0].partition(".")[0] for item in (*REQUIREMENTS, *OPTIONAL)}
    body = "import os\nraise ImportError(os.environ['MEGAMOE_CANARY'] + ' in ' + __file__)\n"
    for name in names:
        write_package(tmp_path, name, body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MEGAMOE_CANARY", CANARY)
    return tmp_path


def test_the_command_survives_everything_broken_and_leaks_nothing(shadows):
    full = [sys.executable, "-m", "megamoe", "doctor"]
    text = subprocess.run(full, capture_output=True, text=True, check=False, cwd=ROOT)
    as_json = subprocess.run(
        [*full, "--json"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    for done in (text, as_json):
        assert (done.returncode, done.stderr) == (1, "")
        assert CANARY not in done.stdout
        assert str(shadows) not in done.stdout
        assert str(Path.home()) not in done.stdout
    assert "broken: ImportError: <hidden> in __init__.py" in text.stdout
    assert text.stdout.endswith("verdict: this machine can plan, but not train\n")
    assert json.loads(as_json.stdout)["can"] == "plan"


def test_the_command_imports_nothing_heavy_itself(shadows):
    script = (
        "import sys; from megamoe.__main__ import main; main(['doctor']); "
        "sys.stderr.write(' '.join({'torch', 'numpy', 'megatron', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == ""


def test_a_time_limit_of_nothing_is_a_mistake(capsys):
    for given in ("0", "-1", "nan"):
        assert command.main(["doctor", "--time-limit", given]) == 2
        assert "leaves no time; give seconds above 0" in capsys.readouterr().err
