"""`ufbert plan`: counts of the compiled step, the arithmetic on them, and what the command prints."""

import json
from dataclasses import replace

import pytest

from ufbert import nn
from ufbert.cli import call
from ufbert.config.presets import load_preset, preset_names, scaled
from ufbert.cost.devices import DEVICES, device_of_kind, find_device
from ufbert.cost.flops import predicted_share, routing_flops_per_token, train_bytes_per_token, train_flops_per_token
from ufbert.cost.parts import PartSpeeds, local_speeds, product_widths
from ufbert.cost.reached import MEASUREMENTS, reached
from ufbert.cost.speeds import CPU_UTILISATION, Speeds, device_peak, peak_speeds
from ufbert.errors import UserError
from ufbert.plan import check as plan_check
from ufbert.plan.check import Check
from ufbert.plan.counts import (
    RunCounts,
    StepCount,
    analytic_bytes,
    compiled_for_cpu,
    count_run,
    count_step,
    moved_bytes,
    planned_model,
    real_update,
)
from ufbert.plan.estimate import Times, plan_run
from ufbert.plan.target import start_target
from ufbert.pretrain.budget import Budget, parse_budget
from ufbert.pretrain.schedules import Stage


def on_cpu(name, scale="tiny", trees="gather"):
    run = planned_model(scaled(load_preset(name), scale), dtype="float32", trees=trees)
    train, data = replace(run.train, batch_rows=8, micro_rows=8), replace(run.data, short_until=0.0)
    return replace(run, train=train, data=data)


@pytest.fixture(scope="module")
def dense_counts():
    return count_run(on_cpu("crammed_bert"))


def test_the_compiled_dense_step_has_the_analytic_operations(dense_counts):
    run = on_cpu("crammed_bert")
    counted = dense_counts.gradient[8, Stage(128, next_token=False)].flops / (8 * 128)
    assert counted == pytest.approx(train_flops_per_token(run, masked_trees=False), rel=0.06)


def test_memory_between_compiled_sizes_is_that_of_the_compiled_step(dense_counts):
    """The line through 4 and 8 rows meets what 16 rows hold."""
    run = on_cpu("crammed_bert")
    longer = count_run(replace(run, train=replace(run.train, batch_rows=16, micro_rows=16)))
    assert dense_counts.memory(16) == pytest.approx(longer.memory(16), rel=0.05)
    assert dense_counts.memory(16) > dense_counts.memory(8) > dense_counts.state_bytes


@pytest.mark.parametrize("name", ["crammed_bert", "ultrafastbert_1x11", "fnet"])
@pytest.mark.parametrize("trees", ["gather", "native"])
def test_analytic_bytes_are_near_those_of_the_compiled_step(name, trees):
    run = on_cpu(name, trees=trees)
    count = count_step(run, "gradient", 8, 128)
    assert train_bytes_per_token(run, trees=trees, bfloat16=False) == pytest.approx(count.bytes / 1024, rel=0.2)


@pytest.mark.parametrize(("rows", "width"), [(300, 0), (30_000, 0), (30_000, 64)])
def test_a_hashed_table_costs_what_its_rows_that_are_read_cost(rows, width):
    """However long it is: XLA counts all rows, which are no more moved than those of a token embedding."""
    run = on_cpu("crammed_bert")
    run = replace(run, model=replace(run.model, n_layers=1, ngram_rows=rows, ngram_width=width))
    count = count_step(run, "gradient", 8, 128)
    assert train_bytes_per_token(run, trees="gather", bfloat16=False) == pytest.approx(count.bytes / 1024, rel=0.2)
    flops = train_flops_per_token(run, masked_trees=False)
    assert count.flops / 1024 == pytest.approx(flops, rel=0.08)
    plain = replace(run, model=replace(run.model, ngram_rows=0))
    assert flops - train_flops_per_token(plain, masked_trees=False) == 3 * 2 * 3 * width * 128
    assert nn.count_params(run.model) - nn.count_params(plain.model) == 3 * (rows + (128 if width else 0)) * (
        width or 128
    )


def made_up(gradient=(1e9, 1e6), finish=(1e6, 1e6)) -> RunCounts:
    one = StepCount(*gradient, memory=100.0, compile_seconds=1.0)
    half = one._replace(memory=60.0)
    end = StepCount(*finish, memory=50.0, compile_seconds=0.5)
    at = Stage(128, next_token=False)
    return RunCounts({(128, at): one, (64, at): half}, end, end, optimizer_bytes=20.0, state_bytes=200e6)


FAST = Speeds(1e15, 1e15, 1e15, source="a test")


def test_memory_is_the_larger_of_gradient_and_update():
    counts = made_up()
    assert [counts.memory(rows) for rows in (64, 128, 256)] == [80.0, 120.0, 200.0]
    assert counts._replace(finish=counts.finish._replace(memory=90.0)).memory(64) == 90.0


def test_a_time_budget_is_spent_to_the_end_and_a_step_budget_to_the_step():
    run = load_preset("crammed_bert")
    run = replace(run, train=replace(run.train, batch_rows=8192))
    kinds = {"masked_trees": True, "compile_seconds": 60.0}
    speeds = Speeds(1e12, 1e12, 1e12, source="a test")
    day = plan_run(run, parse_budget("24h"), made_up(), speeds, **kinds)
    assert day.seconds.total == pytest.approx(86400)
    assert day.seconds.compilation == 60.0
    assert day.seconds.checkpoints == pytest.approx(97 * 1.5)  # one every quarter of an hour, and the last
    assert day.tokens == pytest.approx(day.updates * day.rows_per_update * 128)
    assert day.tokens_per_second == pytest.approx(1e12 / train_flops_per_token(run, masked_trees=True), rel=0.01)
    steps = plan_run(run, Budget(steps=200), made_up(), speeds, **kinds)
    assert steps.updates == pytest.approx(200)
    sizes = [max(1, round(1 + min(1.0, i / 200 / 0.6) * 63)) * 128 for i in range(200)]  # the ramp of the recipe
    assert steps.tokens == pytest.approx(sum(sizes) * 128)


def test_a_budget_below_its_fixed_costs_buys_nothing():
    run = load_preset("crammed_bert")
    found = plan_run(run, Budget(seconds=30.0), made_up(), FAST, masked_trees=True, compile_seconds=60.0)
    assert (found.updates, found.tokens) == (0, 0)


def test_arithmetic_and_memory_traffic_add_up():
    speeds = Speeds(100.0, 10.0, 5.0, source="")
    assert speeds.seconds(1000.0, 100.0, 10.0) == pytest.approx(9 + 10 + 2)
    assert speeds.seconds(1000.0, 0.0, 100.0) == pytest.approx(30)


def test_routing_is_float32_arithmetic_and_counts_as_such():
    tree, dense = load_preset("ultrafastbert_1x11"), load_preset("crammed_bert")
    assert routing_flops_per_token(tree, masked_trees=True) == 16 * 3 * 2 * 768 * 4095
    assert routing_flops_per_token(dense, masked_trees=True) == 0
    h100 = peak_speeds(find_device("h100"), "bfloat16")
    assert h100.products == pytest.approx(reached("h100").products * 989.4e12)
    assert peak_speeds(find_device("2080ti"), "float32").products == pytest.approx(reached("2080ti").float32 * 13.4e12)


@pytest.mark.parametrize(
    "measured", [m for m in MEASUREMENTS if m.tokens_per_second], ids=lambda m: f"{m.device}-{m.of}"
)
def test_every_speed_of_the_table_is_met(measured):
    """From analytic counts, which are a tenth from those of the compiled step."""
    run = load_preset(measured.preset)
    masked, trees = measured.trees == "masked", measured.trees or "gather"
    flops, routing = (count(run, masked_trees=masked) for count in (train_flops_per_token, routing_flops_per_token))
    moved = train_bytes_per_token(run, trees=trees, bfloat16=True)
    speed = 1 / peak_speeds(find_device(measured.device), "bfloat16").seconds(flops, routing, moved)
    assert speed == pytest.approx(measured.tokens_per_second, rel=0.2)


COMPILED = {
    # GB that `count_run` found the gradient to hold for 128 and 64 rows at base, in bfloat16
    "crammed_bert": ({128: 21.81, 64: 11.50}, 0.957, 1.435),
    "ultrafastbert_1x11 by gather": ({128: 37.15, 64: 19.29}, 1.309, 1.964),
}


@pytest.mark.parametrize("measured", [m for m in MEASUREMENTS if m.of in COMPILED and m.memory], ids=lambda m: m.of)
def test_memory_on_a_card_is_near_what_was_measured(measured):
    held, optimizer, state = COMPILED[measured.of]
    at = Stage(128, next_token=False)
    gradient = {(n, at): StepCount(1.0, 1.0, memory=1e9 * held[n], compile_seconds=0.0) for n in held}
    counts = RunCounts(gradient, made_up().finish, made_up().evaluate, 1e9 * optimizer, 1e9 * state)
    shares = reached(measured.device)
    share = shares.gathered if measured.trees == "gather" else shares.memory
    assert counts.memory(128) > 2 * measured.memory
    assert measured.memory / 1.3 < counts.memory(128, share) < measured.memory * 1.3


def test_kernels_for_gpus_are_counted_by_a_stand_in():
    run = on_cpu("ultrafastbert_1x11", trees="pallas")
    counted = compiled_for_cpu(run)
    assert counted.model.tree_backend in ("native", "gather")
    assert compiled_for_cpu(counted) is counted
    more = (
        count_run(run).gradient[8, Stage(128, next_token=False)].bytes - count_step(counted, "gradient", 8, 128).bytes
    )
    assert more == pytest.approx(8 * 128 * (analytic_bytes(run) - analytic_bytes(counted)))


def test_bytes_that_an_accelerators_compiler_cannot_see_are_analytic():
    run = on_cpu("crammed_bert")
    assert moved_bytes(run, "gradient", 8, 5.0, on_cpu=True) == 5.0
    assert moved_bytes(run, "gradient", 8, 5.0, on_cpu=False) == 8 * 128 * analytic_bytes(run)
    assert moved_bytes(run, "finish", 8, 5.0, on_cpu=False) == 5.0


@pytest.mark.parametrize("device", ["cpu", *(device.name for device in DEVICES)])
def test_every_device_says_what_stands_behind_its_figures(device):
    evidence = start_target(device).evidence
    assert set(evidence) == {"peaks", "speed", "memory", "compilation", "checkpoints", "text"}
    assert {text.split()[0].rstrip(":") for text in evidence.values()} <= {"measured", "published", "assumed"}
    kinds = {name: text.split()[0].rstrip(":") for name, text in evidence.items()}
    assert kinds["speed"] == {"cpu": "measured", "h200": "measured", "a6000": "published"}.get(device, "assumed")
    assert kinds["peaks"] == ("measured" if device == "cpu" else "published")


def test_devices_are_known_by_both_names():
    for device in DEVICES:
        assert find_device(device.name) is device
        assert all(device_of_kind(kind) is device for kind in device.kinds)
        assert device.source
    assert device_of_kind("NVIDIA H100 80GB HBM3") is find_device("h100")
    assert device_of_kind("cpu") is None
    with pytest.raises(UserError, match="did you mean h100"):
        find_device("h1000")
    with pytest.raises(UserError, match="known are auto, cpu, h100"):
        find_device("abacus")


def test_the_peak_of_a_device_without_a_data_sheet_is_measured():
    flops, source = device_peak()
    assert flops > 1e8
    assert "measured here" in source


@pytest.mark.parametrize("name", ["crammed_bert", "ultrafastbert_1x11", "fnet", "original_fff", "switch_8e"])
def test_every_kind_of_part_can_be_timed(name):
    parts = PartSpeeds(on_cpu(name))
    parts.measure(1)
    speeds = parts.speeds()
    assert speeds.products > 0
    assert speeds.bandwidth > 0


def test_a_narrow_feedforward_does_not_slow_the_products_of_attention():
    run = on_cpu("crammed_bert")
    run = replace(run, model=replace(run.model, feedforward=("dense",), d_hidden=10))
    head = product_widths(run)[run.model.d_model] - 4 * run.model.n_layers
    assert head == pytest.approx(predicted_share(run.train) * run.model.vocab_size / run.model.d_model)
    parts = PartSpeeds(run)
    square, narrow = parts._products
    assert (square.times, narrow.times) == (4 * run.model.n_layers + head, 2 * run.model.n_layers)
    for part, speed in ((square, 1e11), (narrow, 1e10)):
        part.seconds.append(part.flops / speed)
    for part in parts._rest:
        part.seconds.append(1e-3)
    assert 0.8e11 < parts.speeds().products / CPU_UTILISATION < 1e11


def test_local_speeds_of_a_cpu_are_those_of_the_parts():
    assert "parts reach alone" in local_speeds(on_cpu("crammed_bert"), seconds=0.05).source


def test_the_check_trains_and_says_when_it_disagrees():
    update = real_update(on_cpu("ultrafastbert_1x11"), 4)
    update()
    assert Check(4, 2, 100.0, 126.0).ratio == pytest.approx(1.26)
    assert [Check(4, 2, 100.0, x).holds for x in (74.0, 76.0, 124.0, 126.0)] == [False, True, True, False]


def test_times_add_up():
    assert Times(1.0, 2.0, 3.0, 4.0).total == 10.0


@pytest.mark.long
def test_the_command_plans_and_checks_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_check, "ROUNDS", 2)
    monkeypatch.setattr(plan_check, "SECONDS_PER_ROUND", 0.0)
    file = tmp_path / "plan.json"
    small = ["--config=tiny", "--scale=base", "--train.batch-rows=4", "--train.micro-rows=4"]
    call("plan", [*small, "--budget=20steps", "--device=cpu", "--price=3", "--corpus-tokens=1000", f"--json={file}"])
    shown, facts = capsys.readouterr().out, json.loads(file.read_text())
    for words in ("tokens", "updates", "memory while training", "check on this machine", "money", "passes", "text"):
        assert words in shown
    assert facts["updates"] == 20
    assert facts["tokens"] == 20 * 4 * 128
    assert facts["passes"] == pytest.approx(20 * 4 * 128 / 1000)
    assert facts["check"]["measured"] > 0
    assert facts["money"] == pytest.approx(3 * facts["seconds"]["total"] / 3600)
    assert list(facts["memory"]) == ["1", "2", "4", "8", "16"]
    assert facts["seconds"]["budget"] is None


def test_the_full_size_plan_of_an_accelerator_prints_its_memory(capsys, tmp_path):
    file = tmp_path / "plan.json"
    model = [
        "--config=crammed_bert",
        "--scale=base",
        "--model.n-layers=2",
    ]  # of sixteen, which take a minute to compile
    call("plan", [*model, "--device=h100", "--budget=24h", "--price=2", f"--json={file}"])
    state = 12 * nn.count_params(replace(load_preset("crammed_bert").model, n_layers=2))
    shown, facts = capsys.readouterr().out, json.loads(file.read_text())
    assert "this device is not here" in shown
    assert "assumed  as on h200, crammed_bert" in shown
    assert "128 (configured)" in shown
    assert facts["check"] is None
    assert facts["money"] == 48
    assert (
        "`ufbert prepare --config=crammed_bert --scale=base --model.n-layers=2 --device=h100 --budget=24h` on a cheap"
        in shown
    )
    assert f"{facts['preparation']['seconds'] / 3600 * 2:,.2f} saved" in shown
    assert facts["backend"] == {"compiled_here": False, "dtype": "bfloat16", "trees": "gather"}
    assert facts["state_bytes"] == pytest.approx(state, rel=0.01)
    sizes = [facts["memory"][str(rows)] for rows in (32, 64, 128, 256, 512)]
    assert sizes == sorted(sizes)
    assert sizes[0] > state
    assert 0.05 < facts["model_flops_utilisation"] < 0.5


@pytest.mark.parametrize("device", ["cpu", "h100", "tpu-v5e"])
def test_presets_and_plan_count_the_same_arithmetic(device, capsys):
    call("presets", [f"--device={device}"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    target = start_target(device)
    for name in preset_names():
        run = load_preset(name)
        run = planned_model(run, dtype=target.dtype, trees=target.trees(run))
        train, data = replace(run.train, batch_rows=128, micro_rows=128), replace(run.data, short_until=0.0)
        run = replace(run, train=train, data=data)
        masked = run.model.tree_backend == "masked"
        planned = plan_run(run, Budget(steps=1), made_up(), FAST, masked_trees=masked, compile_seconds=0.0)
        assert f" {planned.flops_per_token / 1e6:,.1f} " in lines[name]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--device=a1000"], "did you mean a100?"),
        (["--budget=1day"], "is not a budget; write weeks, days"),
        (["--config=crammed_brt"], "did you mean crammed_bert?"),
        (["--price=-1"], "must not be negative"),
        (["--json=/nowhere/at/all.json"], "does not exist"),
    ],
)
def test_wrong_options_are_one_sentence(args, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        call("plan", args)
