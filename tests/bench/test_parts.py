"""bench.parts goes through every line on a tiny model."""
import json

from bench import parts


def test_both_steps_are_taken_apart(tmp_path, capsys):
    out = tmp_path / "parts.json"
    assert parts.main(["--tiny", "--rounds", "1", "--steps", "1", "--dtype", "fp32", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["step"] for row in found["summary"]] == ["fused", "plain"]
    for row in found["summary"]:
        assert abs(sum(row["by group"].values()) - 1) < 1e-6 and row["by group"]["products"] > 0
    assert "times as fast" in capsys.readouterr().out
