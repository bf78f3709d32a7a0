"""Figures in the pages are those of the committed logs and reports."""

import json
import re

from docs.pages import read


def test_int8(repository):
    report = json.loads(
        (repository / "benchmarks/results/int8-quick-start-cpu-2026-11-22.json").read_text(encoding="utf-8")
    )
    rows = re.findall(r"^\| (.*) \|$", read("docs/export.md"), re.M)
    told = {name: values for name, *values in ([cell.strip() for cell in row.split("|")] for row in rows)}
    for name, task in (("box AP", "bbox"), ("mask AP", "segm")):
        ap = report["ap"]["shapes_val"][task]
        assert told[name] == ["", f"{ap['float32']:.4f}", f"{ap['int8']:.4f}"]
    assert told["an image, median (quartiles)"] == [
        "{median:.1f} ms ({low:.1f}–{high:.1f})".format(**report["latency"][kind])
        for kind in ("eager", "float32", "int8")
    ]
    assert told["file"] == ["", *(f"{report['bytes'][kind] / 2**20:.1f} MiB" for kind in ("float32", "int8"))]
    assert f"on {report['threads']} cores" in read("docs/export.md")


def test_quick_start(repository):
    log = (repository / "docs/quick_start/log.txt").read_text(encoding="utf-8")
    told = re.search(r"took ([\d.]+) s and ended with a box AP50 of ([\d.]+)", read("docs/getting_started.md"))
    assert f"trained 800 iterations in {told[1]} s" in log
    assert re.search(rf"bbox on 200 images\n.*AP50.*\n +[\d.]+ +{told[2]} ", log, re.M)
