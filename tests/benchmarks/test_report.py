"""The report says what the results file says."""

import json

import pytest

from benchmarks import report


def quantiles(median):
    return {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}


def operator(provider, eager, cold=None, share=None, op="NMS, one set", case="1000 boxes"):
    info = {"kind": "operator", "op": op, "case": case, "dtype": "float32", "direction": "forward", "device": "cuda"}
    times = {"eager_us": quantiles(eager), "graph_cold_us": cold and quantiles(cold), "graph_warm_us": None}
    return {"extra_info": info | times | {"provider": provider, "roofline_share": share}}


def step(provider, milliseconds, peak, **more):
    info = {"kind": "step", "model": "Faster R-CNN R-50-FPN", "mode": "training", "batch": 2, "height": 800}
    info |= {"width": 1333, "dtype": "bfloat16", "provider": provider, "device": "cuda", "peak_mib": peak} | more
    return {"extra_info": info | {"ms": quantiles(milliseconds), "images_per_s": 2e3 / milliseconds}}


GPU = {
    "machine_info": {
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "versions": {"torch": "2.11", "triton": None},
        "commit": "abc1234-dirty",
        "ceilings": {"copy_gb_per_s": 4300.4, "write_gb_per_s": 3900, "l2_read_gb_per_s": 7000, "fp32_tflops": 51.23},
    },
    "datetime": "2026-11-23T10:00:00",
    "benchmarks": [
        operator("fastrcnn", 50, cold=20, share=0.825),
        operator("torchvision", 100, cold=90),
        operator("reference", 2000),
        operator("compiled reference", 500),
        operator("fastrcnn", 40, cold=10, share=0.5, op="anchors", case="267 k"),
        operator("torchvision", 84, op="anchors", case="267 k"),
        operator("fastrcnn", 30, op="matching", case="few"),
        operator("reference", 3600, op="matching", case="few"),
        step("fastrcnn", 50, 2048.0),
        step("torchvision", 120, 3072.0),
        {"extra_info": {}, "name": "of another suite"},
    ],
}


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_operators_compare_times_of_one_kind():
    text = report.markdown(GPU)
    nms = cells(text, "NMS, one set | 1000 boxes")
    assert nms[1] == "1000 boxes, float32, forward"
    # the graphs' times with torchvision, the eager ones with what could not be captured
    assert nms[2:] == ["0.0200", "0.0900", "4.50×", "10.0×", "graph, cold L2", "82 %"]
    assert cells(text, "anchors")[2:] == ["0.0400", "0.0840", "2.10×", "—", "eager", "50 %"]
    assert cells(text, "matching")[2:] == ["0.0300", "—", "—", "120×", "eager", "—"]


def test_steps_without_the_columns_that_nobody_filled():
    row = cells(report.markdown(GPU), "Faster R-CNN R-50-FPN training")
    assert row[1:5] == ["batch 2 of 800×1333, bfloat16", "40.00", "16.67", "2.40×"]
    assert row[5:] == ["2.00", "3.00"]


def test_machine_is_named():
    told = report.machine(GPU)
    assert told.startswith("NVIDIA H200, driver 580.1; torch 2.11; commit abc1234-dirty; 2026-11-23. Measured ceilings")
    assert "copy 4300 GB/s" in told
    assert "51.2 TFLOP/s" in told


def cpu_results():
    steps = [
        step(provider, ms, None, dtype="float32", detections=found)
        for provider, ms in (("fastrcnn", 1400.0), ("torchvision", 2100.0))
        for found in (100, 5)
    ]
    info = {"gpu": None, "threads": 2, "cpu": {"brand_raw": "AMD EPYC"}, "versions": {"torch": "2.15"}}
    return {"machine_info": info, "benchmarks": steps, "commit_info": {"id": "abc"}, "datetime": "2026-11-23T10:00:00"}


def test_cpu_results_and_command_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(cpu_results()))
    monkeypatch.setattr("sys.argv", ["report", str(path), "--chart", str(tmp_path / "chart.png")])
    report.main()
    text = capsys.readouterr().out
    assert "AMD EPYC, 2 threads; torch 2.15; commit abc; 2026-11-23." in text
    assert text.count("1.50×") == 2
    assert "float32, 5 detections" in text
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["report", str(path), "--markdown", str(tmp_path / "table.md")])
    report.main()
    assert (tmp_path / "table.md").read_text() == text
    assert capsys.readouterr().out == ""


def test_chart_has_a_bar_for_each_comparison(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    barh = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda *args, **kw: drawn.append(args[2] + 1) or barh(*args, **kw))
    report.draw(GPU, tmp_path / "chart.png")
    assert drawn == pytest.approx([4.5, 2.1, 120, 2.4])  # against PyTorch only where torchvision has nothing


def test_file_without_results_of_the_suite_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no result of this suite"):
        report.markdown(GPU | {"benchmarks": [{"extra_info": {}}]})
    with pytest.raises(ValueError, match="another provider"):
        report.draw(GPU | {"benchmarks": [operator("fastrcnn", 1)]}, tmp_path / "chart.png")
