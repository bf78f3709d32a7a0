import json
import os
import signal

import pytest
import torch
from engine import standins
from engine.standins import TinyDetector, TrainLoader, tiny_config

from fastrcnn.data import DataError
from fastrcnn.engine import WeightAverage, checkpoint, trainer
from fastrcnn.engine.hooks import Hook
from fastrcnn.engine.solver import LRSchedule, make_optimizer


@pytest.fixture(autouse=True)
def _standins(monkeypatch):
    monkeypatch.setattr(trainer, "build_model", lambda cfg: TinyDetector())
    monkeypatch.setattr(trainer, "make_data_loader", standins.make_data_loader)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(first, second):
    first, second = checkpoint.read(first), checkpoint.read(second)
    assert first["iteration"] == second["iteration"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for index, state in first["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], second["optimizer"]["state"][index]["momentum_buffer"])


class StopAfter(Hook):
    """Calls the function when so many iterations are finished."""

    def __init__(self, iteration, function):
        self.iteration, self.function = iteration, function

    def after_iteration(self, trainer):
        if trainer.iteration == self.iteration:
            self.function()


def with_hook(monkeypatch, hook):
    original = trainer.Trainer.__init__

    def init(self, *args, hooks=(), **kwargs):
        original(self, *args, hooks=[*hooks, hook], **kwargs)

    monkeypatch.setattr(trainer.Trainer, "__init__", init)


def test_the_loop_is_plain_sgd(tmp_path):
    """Against the same training written out with torch alone."""
    cfg = tiny_config(tmp_path, WEIGHT_DECAY=0.01, CLIP_GRADIENTS=0.05)
    torch.manual_seed(0)
    expected, model = TinyDetector(noise=0.0), TinyDetector(noise=0.0)
    model.load_state_dict(expected.state_dict())
    optimizer = torch.optim.SGD(
        [
            {"params": [expected.conv.weight, expected.head.weight], "weight_decay": 0.01},
            {"params": [expected.conv.bias, expected.head.bias], "weight_decay": 0.0},
        ],
        lr=1.0,
        momentum=0.9,
    )
    told = []
    for iteration, (images, targets, _) in enumerate(TrainLoader(cfg, 0, 0, 1)):
        lr = 0.05 * (min(1.0, 1 / 3 + 2 / 3 * iteration / 3) if iteration < 6 else 0.1)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 2 * lr
        losses = expected(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        optimizer.step()
        told.append({k: v.item() for k, v in losses.items()} | {"lr": lr})

    optimizer = make_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    seen = []
    hook = Hook()
    hook.after_iteration = lambda t: seen.append(t.metrics)
    schedule = LRSchedule(cfg, optimizer)
    trainer.Trainer(
        cfg, model, TrainLoader(cfg, 0, 0, 1), optimizer, schedule, scaler, torch.device("cpu"), hooks=[hook]
    ).run()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    assert [m is not None for m in seen] == [False, True] * 4
    for index, entry in enumerate(m for m in seen if m):
        window = told[2 * index : 2 * index + 2]
        assert entry["iteration"] == 2 * index + 2
        assert entry["lr"] == pytest.approx(window[1]["lr"])
        for name in ("loss_box", "loss_small"):
            assert entry[name] == pytest.approx((window[0][name] + window[1][name]) / 2, rel=1e-4)
        assert entry["loss"] == pytest.approx(entry["loss_box"] + entry["loss_small"])


def test_what_a_run_leaves(tmp_path):
    run = trainer.train(tiny_config(tmp_path, TEST_PERIOD=4))
    assert (run.output, run.iteration) == (tmp_path, 8)
    expected = {"config.yml", "labels.json", "last_checkpoint", "log.txt", "metrics.jsonl", "inference"}
    expected |= {"model_0000003.pth", "model_0000006.pth", "model_final.pth"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert json.loads((tmp_path / "labels.json").read_text()) == {"1": "thing"}
    contents = checkpoint.read(tmp_path / "model_final.pth")
    assert contents["categories"] == {1: "thing"}
    assert contents["conventions"] == "modern"
    assert contents["config"] == (tmp_path / "config.yml").read_text()
    lines = metrics(tmp_path)
    assert [line["iteration"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert {"lr", "time", "data_time", "images_per_second", "eta_seconds"} < set(lines[0])
    tests = [line for line in lines if "eval" in line]
    assert [line["iteration"] for line in tests] == [4, 8]
    assert tests[-1]["eval"] == run.results
    assert "iter: 8" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_batch(tmp_path, monkeypatch, parts):
    """Losses that are means over the images: a batch in parts trains as the batch does."""
    monkeypatch.setattr(trainer, "build_model", lambda cfg: TinyDetector(noise=0.0))
    trainer.train(tiny_config(tmp_path / "whole"), skip_test=True)
    trainer.train(tiny_config(tmp_path / "parts", ACCUMULATE_STEPS=parts), skip_test=True)
    whole, accumulated = (checkpoint.read(tmp_path / n / "model_final.pth")["model"] for n in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_accumulation_must_divide_the_batch(tmp_path):
    with pytest.raises(ValueError, match=r"ACCUMULATE_STEPS is 3; it must divide the images of a process, 4"):
        trainer.train(tiny_config(tmp_path, ACCUMULATE_STEPS=3), skip_test=True)


def test_validation_losses_are_the_means_over_the_test_set(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_model", lambda cfg: TinyDetector(noise=0.0))
    cfg = tiny_config(tmp_path, TEST_PERIOD=4, MAX_ITER=8)
    cfg.TEST.IMS_PER_BATCH = 2
    trainer.train(cfg)
    lines = [line for line in metrics(tmp_path) if "eval" in line]
    assert [set(line["validation"]) for line in lines] == [{"loss", "loss_box", "loss_small"}] * 2
    model = TinyDetector(noise=0.0).train()
    model.load_state_dict(checkpoint.read(tmp_path / "model_final.pth")["model"])
    own = tiny_config(tmp_path, IMS_PER_BATCH=2, MAX_ITER=3)  # 6 images
    expected = torch.tensor([[v.item() for v in model(*b[:2]).values()] for b in TrainLoader(own, 0, 0, 1)]).mean(0)
    found = lines[-1]["validation"]
    assert [found["loss_box"], found["loss_small"]] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found["loss"] == pytest.approx(sum(expected.tolist()), rel=1e-5)


def test_validation_does_not_change_the_training(tmp_path):
    """Random numbers, statistics and the mode of the model are as without it."""
    trainer.train(tiny_config(tmp_path / "without"), skip_test=True)
    trainer.train(tiny_config(tmp_path / "with", TEST_PERIOD=2))
    assert_same_state(tmp_path / "without/model_final.pth", tmp_path / "with/model_final.pth")


def test_test_set_without_ground_truth_gives_no_validation_losses(tmp_path, monkeypatch):
    def make(cfg, is_train, **kwargs):
        if is_train and cfg.DATASETS.TRAIN == ("tiny",):
            raise DataError("dataset 'tiny' has no masks")
        return standins.make_data_loader(cfg, is_train, **kwargs)

    monkeypatch.setattr(trainer, "make_data_loader", make)
    trainer.train(tiny_config(tmp_path, TEST_PERIOD=4))
    lines = [line for line in metrics(tmp_path) if "eval" in line]
    assert [line["validation"] for line in lines] == [{}, {}]
    assert "no validation losses: dataset 'tiny' has no masks" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("stop", [3, 5], ids=["at a checkpoint", "between checkpoints"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, stop):
    trainer.train(tiny_config(tmp_path / "whole"), skip_test=True)
    cfg = tiny_config(tmp_path / "parts")
    with monkeypatch.context() as patch:
        with_hook(patch, StopAfter(stop, lambda: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            trainer.train(cfg, skip_test=True)
    assert checkpoint.read_last(tmp_path / "parts")[1]["iteration"] == stop
    assert trainer.train(cfg, resume=True, skip_test=True).iteration == 8
    assert_same_state(tmp_path / "whole/model_final.pth", tmp_path / "parts/model_final.pth")
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line["iteration"] for line in parts] == [2, 4, 6, 8]
    assert parts[-1]["loss"] == whole[-1]["loss"]


def test_random_seed_is_kept_on_resume(tmp_path, monkeypatch):
    cfg = tiny_config(tmp_path)
    cfg.SEED = -1
    with monkeypatch.context() as patch:
        with_hook(patch, StopAfter(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(cfg, skip_test=True)
    seed = checkpoint.read_last(tmp_path)[1]["seed"]
    trainer.train(cfg, resume=True, skip_test=True)
    assert checkpoint.read(tmp_path / "model_final.pth")["seed"] == seed
    assert cfg.SEED == -1  # the caller's config is not changed


def test_sigterm_saves_and_ends(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with_hook(monkeypatch, StopAfter(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as end:
        trainer.train(tiny_config(tmp_path), skip_test=True)
    assert end.value.code == 143
    assert checkpoint.read(tmp_path / "model_0000002.pth")["iteration"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_ctrl_c_stops_at_once_and_still_saves(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with_hook(monkeypatch, StopAfter(2, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_config(tmp_path), skip_test=True)
    assert checkpoint.read(tmp_path / "model_0000002.pth")["iteration"] == 2


def test_an_error_in_the_data_loses_nothing(tmp_path, monkeypatch):
    def broken(self):
        for count, batch in enumerate(TrainLoader(self.cfg, 0, 0, 1).batches()):
            if count == 5:
                raise ValueError("image file a.jpg (image id 7) cannot be read")
            yield batch

    monkeypatch.setattr(TrainLoader, "batches", TrainLoader.__iter__, raising=False)
    monkeypatch.setattr(TrainLoader, "__iter__", broken)
    with pytest.raises(ValueError, match="image id 7"):
        trainer.train(tiny_config(tmp_path), skip_test=True)
    assert checkpoint.read_last(tmp_path)[1]["iteration"] == 5
    assert "image id 7" in (tmp_path / "log.txt").read_text()  # with the stack trace


def test_an_interrupted_update_is_not_saved(tmp_path, monkeypatch):
    steps = []

    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_config(tmp_path), skip_test=True)
    assert checkpoint.read_last(tmp_path)[1]["iteration"] == 3


@pytest.mark.parametrize(
    ("log_period", "checkpoint_period", "left"),
    [(4, 2, ["model_0000002.pth"]), (8, 5, [])],
    ids=["found when the losses are read", "found before a checkpoint"],
)
def test_loss_that_is_not_finite(tmp_path, monkeypatch, log_period, checkpoint_period, left):
    original = TrainLoader.__iter__

    def poisoned(self):
        for number, (images, targets, ids) in enumerate(original(self)):
            if number == 3:
                targets.boxes.fill_(float("nan"))
            yield images, targets, ids

    monkeypatch.setattr(TrainLoader, "__iter__", poisoned)
    cfg = tiny_config(tmp_path, LOG_PERIOD=log_period, CHECKPOINT_PERIOD=checkpoint_period)
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 4: loss_box nan, loss_small 0\."):
        trainer.train(cfg, skip_test=True)
    assert [p.name for p in tmp_path.glob("*.pth")] == left


def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    """The loss of iteration 3 is finite, its update is not."""
    original = torch.optim.SGD.step
    steps = []

    def step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(FloatingPointError, match=r"after iteration 3, first of all conv\.weight"):
        trainer.train(tiny_config(tmp_path), skip_test=True)
    assert not list(tmp_path.glob("*.pth"))


def test_folder_of_another_run_is_refused(tmp_path):
    cfg = tiny_config(tmp_path, MAX_ITER=2)
    trainer.train(cfg, skip_test=True)
    before = (tmp_path / "model_final.pth").read_bytes()
    with pytest.raises(FileExistsError, match=rf"{tmp_path} holds .* --resume .* OUTPUT_DIR"):
        trainer.train(cfg, skip_test=True)
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_a_longer_schedule_goes_on(tmp_path):
    trainer.train(tiny_config(tmp_path, MAX_ITER=4), skip_test=True)
    assert trainer.train(tiny_config(tmp_path, MAX_ITER=6), resume=True, skip_test=True).iteration == 6
    assert [line["iteration"] for line in metrics(tmp_path)] == [2, 4, 6]


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert trainer.train(tiny_config(tmp_path, MAX_ITER=2), resume=True, skip_test=True).iteration == 2


def test_numbered_folders(tmp_path):
    base = tmp_path / "quick"

    def folder(resume):
        return trainer.output_folder(base, resume, numbered=True).name

    assert (folder(True), folder(False)) == ("quick", "quick")
    for name in ("quick", "quick-2", "quick-3"):  # the run in quick-3 left no checkpoint
        (tmp_path / name).mkdir()
        if name != "quick-3":
            (tmp_path / name / "model_final.pth").touch()
    assert (folder(True), folder(False)) == ("quick-2", "quick-4")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_and_resumes(tmp_path, dtype):
    cfg = tiny_config(tmp_path, MAX_ITER=4)
    cfg.DTYPE = dtype
    trainer.train(cfg, skip_test=True)
    contents = checkpoint.read(tmp_path / "model_final.pth")
    assert all(value.dtype == torch.float32 for value in contents["model"].values())
    assert bool(contents["scaler"]) == (dtype == "float16")
    cfg.SOLVER.MAX_ITER = 40
    trainer.train(cfg, resume=True, skip_test=True)
    losses = [line["loss_box"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


def test_resume_with_another_precision(tmp_path):
    cfg = tiny_config(tmp_path, MAX_ITER=2)
    trainer.train(cfg, skip_test=True)
    cfg.DTYPE, cfg.SOLVER.MAX_ITER = "float16", 4
    assert trainer.train(cfg, resume=True, skip_test=True).iteration == 4


def test_no_gpu_is_one_message(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cfg = tiny_config(tmp_path)
    cfg.MODEL.DEVICE = "cuda"
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE is 'cuda'"):
        trainer.train(cfg)


@pytest.mark.gpu
def test_no_host_sync_between_readings(tmp_path):
    cfg = tiny_config(tmp_path, LOG_PERIOD=100, CHECKPOINT_PERIOD=0, MAX_ITER=20, ACCUMULATE_STEPS=2)
    device = torch.device("cuda")

    class OnDevice(TinyDetector):
        def forward(self, images, targets):
            return {"loss": self.head(self.conv(images.pixels).mean((2, 3))).square().mean()}

    model = OnDevice().to(device)
    batch = tuple(part.to(device) for part in next(iter(TrainLoader(cfg, 0, 0, 1)))[:2])
    for dtype, name in (("float32", "SGD"), ("float16", "SGD"), ("float16", "AdamW"), ("bfloat16", "AdamW")):
        cfg.DTYPE, cfg.SOLVER.OPTIMIZER = dtype, name
        optimizer = make_optimizer(cfg, model)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
        average = WeightAverage(model, 0.9)
        schedule = LRSchedule(cfg, optimizer)
        run = trainer.Trainer(cfg, model, [], optimizer, schedule, scaler, device, average=average)
        run._restart_clock()
        batches = iter([(*batch, [])] * 6)
        for _ in range(3):
            run._iterate(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                run._iterate(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run._read_losses()
        assert run.metrics["max_mem_mb"] > 0
