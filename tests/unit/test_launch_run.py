"""`megamoe run` from the first line to the report, with ranks that only pretend to train."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from launch.cli_run import train_here
from launch.lock import hold_lock
from megamoe.__main__ import main
from megamoe.checkpoints import folder as files
from megamoe.errors import LaunchError, MegamoeError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.json import digest, write_plan
from tests.unit import saved
from tests.unit.disks import room, tmpfs
from tests.unit.test_plan_build import CPU, RECIPE, data_folder

PLAN = build_plan(RECIPE, CPU, Options())
RANK = """
import os, sys
from pathlib import Path
from tests.unit import saved
folder, segment, fail_in, plan_digest = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if str(segment) == fail_in:
    if os.environ["RANK"] == "1":
        raise RuntimeError("a bad day")
elif os.environ["RANK"] == "0":
    print("segment", segment)
    progress = saved.progress(segment, segment=segment, segment_done=True, plan_digest=plan_digest)
    saved.save(folder / "checkpoints", progress)
"""


def ranks(folder, fail_in="none"):
    """The command of ranks that save a checkpoint, but for rank 1 of one segment, which fails."""
    rest = (str(folder), "{}", fail_in, digest(PLAN))
    return lambda index: (
        sys.executable, "-c", RANK, *(part.format(index) for part in rest)
    )  # fmt: skip


def lines_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def events(folder):
    return [line["event"] for line in lines_of(folder)]


def damage(checkpoint):
    """Change a byte that only reading the whole checkpoint shows; return the file."""
    shard = checkpoint / "__1_0.distcp"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    return shard


def test_a_run_ends_with_its_checkpoint_and_its_report(tmp_path, capfd):
    run = tmp_path / "run"
    assert train_here(run, PLAN, {"tokens_asked": [1, 2]}, ranks(run)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"starts in {run}; logs in {run / 'logs'}"
    assert lines[1:3] == ["segment 0", "segment 1"]
    assert lines[3] == f"checkpoint  {run / 'checkpoints' / '000000000000001'}"
    assert lines[4] == f"report      {run / 'report.html'}"
    assert (run / "report.html").exists()


def test_a_run_that_failed_goes_on_where_it_stopped(tmp_path, capfd):
    run = tmp_path / "run"
    with pytest.raises(LaunchError, match=r"small/reasoning: rank 1 of segment 1 .*a bad day"):
        train_here(run, PLAN, {}, ranks(run, fail_in="1"))
    assert f"not finished; continue with `megamoe run {run}`" in capfd.readouterr().out
    train_here(run, PLAN, {}, ranks(run))
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith(f"continues in {run}")
    assert "segment 0" not in lines
    assert events(run) == [
        "created",
        "launched",
        "segment_started",
        "segment_done",
        "segment_started",
        "segment_failed",
        "launched",
        "segment_started",
        "segment_done",
        "run_done",
    ]


def test_a_run_that_falls_back_trains_again_what_the_damaged_checkpoint_held(tmp_path, capfd):
    run = tmp_path / "run"
    train_here(run, PLAN, {}, ranks(run))
    older, newer = files.all_checkpoints(run / "checkpoints")
    shard = damage(newer)
    before = len(events(run))
    capfd.readouterr()
    assert train_here(run, PLAN, {}, ranks(run), fallback=True) == 0
    problem = f"{shard}: is damaged, its SHA-256 is another (written by rank 1)"
    assert capfd.readouterr().out.splitlines()[:5] == [
        "reads the checkpoint and compares it with its manifest",
        f"set aside: {problem}",
        f"sound: {older}",
        f"continues in {run}; logs in {run / 'logs'}",
        "segment 1",
    ]
    _, fell_back, started, *_ = lines_of(run)[before:]
    assert fell_back["event"] == "fell_back"
    assert (fell_back["checkpoint"], fell_back["problems"]) == (older.name, [problem])
    assert (started["event"], started["segment"]) == ("segment_started", 1)
    assert events(run)[-2:] == ["segment_done", "run_done"]
    assert files.latest(run / "checkpoints") == newer
    files.verify(newer)
    assert newer.with_name(f"{newer.name}.damaged").is_dir()


def test_the_command_falls_back_when_it_is_told_to(tmp_path, capfd):
    run = tmp_path / "run"
    train_here(run, PLAN, {}, ranks(run))
    done = files.latest(run / "checkpoints")  # the plan is: no rank has to start
    newer = saved.progress(2, segment=1, segment_done=True, plan_digest=digest(PLAN))
    damage(saved.save(run / "checkpoints", newer))
    assert main(["run", str(run), "--fallback"]) == 0
    assert f"sound: {done}" in capfd.readouterr().out
    assert events(run)[-2:] == ["fell_back", "run_done"]
    assert files.latest(run / "checkpoints") == done


def test_a_run_whose_checkpoint_is_sound_has_nothing_to_fall_back_from(tmp_path):
    run = tmp_path / "run"
    train_here(run, PLAN, {}, ranks(run))
    assert main(["run", str(run), "--fallback"]) == 0
    assert events(run)[-2:] == ["launched", "run_done"]


def test_only_a_run_folder_can_fall_back(capsys):
    assert main([*TINY, "--fallback"]) == 2
    assert "--fallback continues a run, and vaetki_7b_a1b is no run folder" in (
        capsys.readouterr().err
    )


def test_a_second_run_of_the_same_folder_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with hold_lock(run), pytest.raises(LaunchError, match="held by process"):
        train_here(run, PLAN, {}, ranks(run))
    assert not (run / "events.jsonl").exists()


def test_a_folder_with_a_plan_made_by_hand_runs(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_plan(run / "plan.json", PLAN)
    train_here(run, PLAN, {}, ranks(run))
    assert events(run)[-1] == "run_done"


def test_a_plan_for_many_nodes_is_refused(tmp_path):
    plan = build_plan(RECIPE, replace(CPU, num_nodes=2, devices_per_node=1), Options())
    with pytest.raises(LaunchError, match="is planned for 2 nodes of 'local'"):
        train_here(tmp_path, plan, {}, ranks(tmp_path))


def mistake(capsys):
    """What the command said, in one line."""
    said = capsys.readouterr().err
    assert said.startswith("megamoe: error: ")
    assert said.count("\n") == 1
    return said.removeprefix("megamoe: error: ")


AGAIN = "; mend that and give the command again, or give another --run-dir"


@pytest.mark.parametrize(
    ("name", "is_folder", "reason"),
    [
        ("checkpoints", False, "File exists"),
        ("logs", False, "File exists"),
        ("lock", True, "Is a directory"),
        ("events.jsonl", True, "Is a directory"),
    ],
)
def test_what_stands_in_the_way_in_a_run_folder_is_named(tmp_path, capsys, name, is_folder, reason):
    write_plan(tmp_path / "plan.json", PLAN)
    obstacle = tmp_path / name
    obstacle.mkdir() if is_folder else obstacle.touch()
    assert main(["run", str(tmp_path)]) == 2
    assert mistake(capsys) == f"{obstacle}: {reason}{AGAIN}\n"


def test_a_file_is_no_place_for_a_run(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path, place, reason in (
        (file, file, "File exists"),
        (file / "run", file / "run", "Not a directory"),
    ):
        with pytest.raises(MegamoeError) as caught:
            train_here(path, PLAN, {}, ranks(path))
        assert str(caught.value) == f"{place}: {reason}{AGAIN}"


@pytest.mark.parametrize(("num_bytes", "place"), [(0, ""), (300, "/environment.json")])
def test_a_run_does_not_begin_where_there_is_no_room(tmp_path, num_bytes, place):
    run = tmp_path / "run"
    with room(num_bytes), pytest.raises(MegamoeError) as caught:
        train_here(run, PLAN, {}, ranks(run))
    assert str(caught.value) == f"{run}{place}: File too large{AGAIN}"
    assert train_here(run, PLAN, {}, ranks(run)) == 0
    assert events(run)[0] == "created"


def test_a_place_that_may_not_be_written_is_named(tmp_path):
    with tmpfs(tmp_path):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(MegamoeError) as caught:
            train_here(tmp_path / "run", PLAN, {}, ranks(tmp_path / "run"))
    assert str(caught.value) == f"{tmp_path}/run: Read-only file system{AGAIN}"


def test_a_pointer_that_cannot_be_written_when_falling_back_is_named(tmp_path, capsys):
    run = tmp_path / "run"
    train_here(run, PLAN, {}, ranks(run))
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").mkdir()
    assert main(["run", str(run), "--fallback"]) == 2
    assert mistake(capsys) == f"{run}/checkpoints/latest: Is a directory{AGAIN}\n"


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_named(tmp_path, capsys):
    run = tmp_path / "run"
    train_here(run, PLAN, {}, ranks(run))
    older, newer = files.all_checkpoints(run / "checkpoints")
    with tmpfs(newer):  # hides its files, and holds its name
        assert main(["run", str(run), "--fallback"]) == 2
    assert mistake(capsys) == f"{newer}: Device or resource busy{AGAIN}\n"
    assert files.latest(run / "checkpoints") == older


def test_a_name_that_no_file_can_have_is_a_mistake(capsys):
    assert main(["run", "x" * 300]) == 2
    assert "File name too long; give a recipe, or a run folder that can be read" in mistake(capsys)


TINY = ["run", "vaetki_7b_a1b", "--scale", "tiny"]


def test_no_data_says_how_to_make_some(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(TINY) == 2
    printed = capsys.readouterr().err
    assert "data/sample has no manifest.json; make one with `make train`" in printed
    assert "`megamoe data tokenize`" in printed


def test_data_of_other_sources_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sample").mkdir(parents=True)
    data_folder(tmp_path / "data" / "sample")
    assert main(TINY) == 2
    assert "source 'english' is not in data/sample/manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_of_full_size_is_not_for_a_processor(tmp_path, capsys):
    assert main(["run", "vaetki_7b_a1b", "--data", data_folder(tmp_path)]) == 2
    assert "use --scale tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--set", "general.lr.peak=1e-4"], "--set"),
        (["--nproc", "4", "--seed", "3"], "--nproc, --seed"),
        (["--keep-checkpoints", "9"], "--keep-checkpoints"),
        (["--data", "elsewhere"], "--data"),
    ],
)
def test_a_run_folder_takes_no_wishes_that_its_plan_settles(tmp_path, arguments, refused, capsys):
    write_plan(tmp_path / "plan.json", PLAN)
    assert main(["run", str(tmp_path), *arguments]) == 2
    assert f"its plan.json settles {refused}; leave that out" in capsys.readouterr().err


def test_gpus_are_counted_by_the_person(tmp_path, capsys):
    assert main([*TINY, "--device", "cuda", "--data", data_folder(tmp_path)]) == 2
    assert "--device cuda: say how many GPUs to use; give --nproc N" in capsys.readouterr().err
