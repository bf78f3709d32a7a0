from fastrcnn.config import dump_config, load_config


def test_report_is_written_where_it_is_wanted(tmp_path, fastrcnn_command):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yml").write_text(dump_config(load_config("quick_start", ["MODEL.DEVICE", "cpu"])))
    code, out, err = fastrcnn_command("report", run)
    assert (code, err) == (0, "")
    assert out == f"written to {run / 'report.html'}\n"
    assert "was not evaluated" in (run / "report.html").read_text()
    code, out, _ = fastrcnn_command("report", run, "--output", tmp_path / "new" / "other.html")
    assert code == 0
    assert (tmp_path / "new/other.html").read_bytes() == (run / "report.html").read_bytes()


def test_mistakes_end_with_one_message(tmp_path, fastrcnn_command):
    code, out, err = fastrcnn_command("report", tmp_path / "absent")
    assert (code, out) == (2, "")
    assert "absent is no folder of a run" in err
    (tmp_path / "config.yml").write_text("SOLVER: {BASE_LRR: 1}")
    code, out, err = fastrcnn_command("report", tmp_path)
    assert (code, out) == (2, "")
    assert "SOLVER.BASE_LR" in err
