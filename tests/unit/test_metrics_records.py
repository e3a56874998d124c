"""metrics.jsonl: each step once, units in the names, nothing that was not measured."""

import json
import math
from dataclasses import replace

import pytest

from megamoe.plan.build import Options, build_plan
from megamoe.plan.flops import train_flops_per_token
from megamoe.step import EvalResult, SaveResult, StepResult
from megamoe.train.metrics import (
    UNITS,
    MetricsFile,
    eval_record,
    read_records,
    save_record,
    step_record,
)
from tests.unit.test_plan_build import CPU, RECIPE

PLAN = build_plan(RECIPE, CPU, Options())
SEGMENT = PLAN.segments[0]
GPUS = replace(CPU, device="cuda", peak_flops_per_s=1e12)


def result(step, **changes):
    values = {
        "stage": "general",
        "segment": 0,
        "step": step,
        "tokens_seen": step * 512,
        "step_tokens": 512,
        "loss_tokens": 500,
        "loss": 3.5,
        "mtp_loss": None,
        "aux_losses": (("aux", 0.01),),
        "grad_norm": 0.7,
        "lr": 1e-3,
        "sequences": 8,
        "seconds": 0.5,
        "expert_load": (1.5, 1.25),
        "memory_bytes": 2**30,
        "cp_bytes": (),
    }
    return StepResult(**(values | changes))


def measured(step, **changes):
    values = {
        "stage": "general",
        "segment": 0,
        "step": step,
        "tokens_seen": step * 512,
        "source": "korean",
        "loss": 3.75,
        "tokens": 1_024,
    }
    return EvalResult(**(values | changes))


def saved(step, **changes):
    values = {
        "stage": "general",
        "segment": 0,
        "step": step,
        "tokens_seen": step * 512,
        "stall_seconds": 0.25,
        "seconds": 1.5,
        "num_bytes": 42_000_000,
        "error": None,
    }
    return SaveResult(**(values | changes))


def test_bytes_of_context_parallelism_are_told_by_kind_of_layer():
    shared = (("local", 100, 200), ("global", 3_000, 4_000))
    record = step_record(result(1, cp_bytes=shared), PLAN, SEGMENT)
    assert {key: value for key, value in record.items() if key.startswith("cp_bytes")} == {
        "cp_bytes.local.forward": 100,
        "cp_bytes.local.backward": 200,
        "cp_bytes.global.forward": 3_000,
        "cp_bytes.global.backward": 4_000,
    }
    assert not any(key.startswith("cp_bytes") for key in step_record(result(1), PLAN, SEGMENT))


def open_file(folder, steps_done=0):
    return MetricsFile(folder, PLAN, SEGMENT, steps_done, print)


def records(folder):
    return list(read_records(folder / "metrics.jsonl"))


def test_a_save_is_a_flat_record_with_an_error_only_if_it_failed():
    record = {
        "kind": "save",
        "stage": "general",
        "segment": 0,
        "step": 3,
        "tokens_seen": 1_536,
        "stall_seconds": 0.25,
        "save_seconds": 1.5,
        "checkpoint_bytes": 42_000_000,
    }
    assert save_record(saved(3)) == record
    assert save_record(saved(3, error="no room")) == record | {"error": "no room"}


def test_a_step_is_a_flat_record():
    assert step_record(result(3, mtp_loss=4.5), PLAN, SEGMENT) == {
        "kind": "step",
        "stage": "general",
        "segment": 0,
        "step": 3,
        "tokens_seen": 1_536,
        "step_tokens": 512,
        "loss_tokens": 500,
        "loss_nats_per_token": 3.5,
        "mtp_loss_nats_per_token": 4.5,
        "aux_loss.aux": 0.01,
        "grad_norm": 0.7,
        "lr": 1e-3,
        "step_sequences": 8,
        "step_seconds": 0.5,
        "tokens_per_s": 1_024.0,
        "expert_load_max_over_mean": [1.5, 1.25],
        "memory_bytes": 2**30,
    }


def test_what_was_not_measured_is_absent():
    record = step_record(result(1), PLAN, SEGMENT)
    assert not {"mtp_loss_nats_per_token", "mfu", "tflops_per_s_per_gpu"} & record.keys()


def test_gpus_have_a_rate_and_a_share_of_their_peak():
    record = step_record(result(1), replace(PLAN, cluster=GPUS), SEGMENT)
    flops_per_s = 1_024 * train_flops_per_token(PLAN, SEGMENT) / 2
    assert record["tflops_per_s_per_gpu"] == pytest.approx(flops_per_s / 1e12, rel=1e-12)
    assert record["mfu"] == pytest.approx(flops_per_s / 1e12, rel=1e-12)


def test_a_gpu_of_unknown_peak_has_no_mfu():
    plan = replace(PLAN, cluster=replace(GPUS, peak_flops_per_s=None))
    record = step_record(result(1), plan, SEGMENT)
    assert "mfu" not in record
    assert "tflops_per_s_per_gpu" in record


def test_every_field_has_a_unit(tmp_path):
    open_file(tmp_path).close()
    units = json.loads((tmp_path / "metrics.units.json").read_text())
    assert units == UNITS
    shared = result(1, mtp_loss=1.0, cp_bytes=(("local", 1, 2),))
    step = step_record(shared, replace(PLAN, cluster=GPUS), SEGMENT)
    names = {
        name.replace("aux_loss.aux", "aux_loss.<name>").replace("cp_bytes.local", "cp_bytes.<kind>")
        for name in step
    }
    others = eval_record(measured(1)).keys() | save_record(saved(1, error="no room")).keys()
    assert names | others == units.keys()


def test_a_record_is_in_the_file_when_the_call_returns(tmp_path):
    file = open_file(tmp_path)
    file.record_step(result(1))
    file.record_evals([measured(1)])
    assert [record["kind"] for record in records(tmp_path)] == ["step", "eval"]
    file.close()


@pytest.mark.parametrize(
    ("steps_done", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3, 3]), (4, [1, 2, 3, 3, 4])]
)
def test_a_resumed_run_drops_what_it_will_do_again(tmp_path, steps_done, kept):
    file = open_file(tmp_path)
    for step in (1, 2, 3, 4):
        file.record_step(result(step))
        if step == 3:
            file.record_evals([measured(step)])
    file.close()
    open_file(tmp_path, steps_done).close()
    assert [record["step"] for record in records(tmp_path)] == kept


def test_each_step_stands_once_after_a_crash(tmp_path):
    file = open_file(tmp_path)
    for step in (1, 2, 3):
        file.record_step(result(step, loss=1.0))
    file.close()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"kind": "step", "step": 4, "los')
    file = open_file(tmp_path, 1)
    for step in (2, 3, 4):
        file.record_step(result(step, loss=2.0))
    file.close()
    found = [(record["step"], record["loss_nats_per_token"]) for record in records(tmp_path)]
    assert found == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_a_line_cut_short_right_after_its_checkpoint_is_dropped(tmp_path):
    file = open_file(tmp_path)
    file.record_step(result(1))
    file.close()
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"kind"')
    open_file(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize(("loss", "text"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_no_number_is_kept_as_a_word(tmp_path, loss, text):
    file = open_file(tmp_path)
    file.record_step(result(1, loss=loss))
    file.close()
    assert records(tmp_path)[0]["loss_nats_per_token"] == text
    assert str(float(text)) == str(loss)
