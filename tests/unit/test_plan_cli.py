"""`megamoe plan` as a person meets it."""

import subprocess
import sys

import pytest

from megamoe.__main__ import main
from megamoe.errors import PlanError
from megamoe.plan.cli import local_cluster, named_cluster
from megamoe.plan.json import read_plan
from tests.unit.test_plan_build import data_folder

TINY = ["plan", "vaetki_7b_a1b", "--scale", "tiny"]


def test_the_table_shows_every_segment_and_the_file_is_the_plan(tmp_path, capsys):
    path = tmp_path / "plan.json"
    command = [
        "plan", "vaetki_7b_a1b", "--cluster", "h200-8x400g", "--nodes", "32", "--seed", "5",
        "-o", str(path),
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    for part in (
        "7,250,296,320 parameters",
        "h200-8x400g: 32 x 8 H200 SXM",
        "0 general",
        "2 long_context",
        "6.6285e+09",
        "days at 40% of bf16 peak: an assumption, not a measurement",
        f"wrote {path}",
    ):
        assert part in printed
    plan = read_plan(path)
    assert (plan.seed, plan.cluster.world_size, plan.deterministic) == (5, 256, True)


def test_data_is_shown_with_epochs(tmp_path, capsys):
    folder = data_folder(tmp_path)
    mixture = "*.mixture=(('korean', 3.0), ('code', 1.0))"
    command = [*TINY, "--nproc", "2", "--data", folder, "--set", mixture]
    assert main([*command, "--set", "*.fim_rate=0.0"]) == 0
    printed = capsys.readouterr().out
    assert "data of general: korean 75.0% (" in printed
    assert "epochs), code 25.0% (" in printed


def test_no_time_is_promised_without_a_known_peak(capsys):
    assert main([*TINY, "--nproc", "2"]) == 0
    printed = capsys.readouterr().out
    assert "days" not in printed
    assert "scale tiny" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no machine is named; give --nproc N or --cluster NAME (known: h100-1, "),
        (
            ["--cluster", "h200-8x"],
            "--cluster: 'h200-8x' is not known; did you mean 'h200-8x400g'?",
        ),
        (["--cluster", "h200-1", "--nodes", "0"], "num_nodes: 0 is out of range"),
        (["--nproc", "0"], "--nproc: 0 leaves nothing to run; give at least 1"),
        (["--nproc", "2", "--nodes", "2"], "--nodes: counts the nodes of a cluster"),
        (["--nproc", "2", "--seed", "-1"], "--seed: -1 is out of range"),
        (["--nproc", "2", "--checkpoint-every", "0"], "--checkpoint-every: 0 is out of range"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main([*TINY, *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys):
    path = tmp_path / "none" / "plan.json"
    assert main([*TINY, "--nproc", "2", "-o", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"megamoe: error: {path}: No such file or directory; mend that, or give another -o\n"
    )


def test_a_cluster_may_be_a_file_of_ones_own(tmp_path):
    text = (
        'device="cuda"\ndevice_name="H100 SXM"\ndevices_per_node=4\nmemory_bytes=80_000_000_000\n'
    )
    path = tmp_path / "ours.toml"
    path.write_text(text + "peak_flops_per_s=989.4e12\nnetwork_bytes_per_s=100e9\n")
    cluster = named_cluster(str(path), 3)
    assert (cluster.name, cluster.world_size) == ("ours", 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device=", "Invalid value"),
        ('device="cuda"', "missing"),
        ('device="cuda"\nname="x"', "name"),
    ],
)
def test_a_cluster_file_that_is_wrong_is_refused(tmp_path, text, message):
    path = tmp_path / "ours.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=rf"ours\.toml: .*{message}"):
        named_cluster(str(path), 1)


def test_every_shipped_cluster_is_sound():
    for name, memory_bytes in (("h100-8x400g", 80e9), ("h200-8x400g", 141e9), ("h200-1", 141e9)):
        cluster = named_cluster(name, 1)
        assert cluster.peak_flops_per_s == 989.4e12
        assert cluster.memory_bytes == memory_bytes


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PlanError, match="nvidia-smi finds no GPU; give --device cpu"):
        local_cluster(1, "cuda")


def test_a_gpu_of_a_known_kind_has_its_peak(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA H200\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    cluster = local_cluster(8, "cuda")
    assert (cluster.device_name, cluster.peak_flops_per_s) == ("NVIDIA H200", 989.4e12)


def test_planning_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from megamoe.__main__ import main; "
        "main(['plan', 'vaetki_7b_a1b', '--cluster', 'h200-8x400g', '--nodes', '32']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
