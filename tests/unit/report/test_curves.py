"""Learning curves of the stages of training."""

import json

from celldetr.report.curves import draw_curves, read_log

SCORES = {"detection": {"precision": 0.5, "recall": 0.5, "f1": 0.5}, "f1": {"neoplastic": 0.25}, "score": 0.5}


def curves(folder, train, val):
    """Draw three epochs, of which the second was not validated; return the lines of each panel by label."""
    lines = [{"epoch": epoch, "train": train, "val": None if epoch == 2 else val} for epoch in (1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    panels = draw_curves(read_log(folder / "log.jsonl"), chosen=3).axes
    return [{line.get_label(): line.get_xydata().tolist() for line in panel.lines[:-1]} for panel in panels], panels


def test_losses_and_scores_are_drawn_where_they_were_measured(tmp_path):
    losses = {"loss": 3.0, "nucleus": 1.0, "l1": 2.0}
    (total, parts, found), _ = curves(tmp_path, losses, losses | SCORES)
    assert total == {"training": [[1, 3], [2, 3], [3, 3]], "validation": [[1, 3], [3, 3]]}
    assert parts == {"nucleus": [[1, 1], [3, 1]], "l1": [[1, 2], [3, 2]]}
    assert found == {"detection": [[1, 0.5], [3, 0.5]], "neoplastic": [[1, 0.25], [3, 0.25]]}


def test_systems_without_losses_in_validation_show_the_parts_of_the_training_loss(tmp_path):
    names = [f"part_{number}" for number in range(8)]
    (total, parts, found), panels = curves(tmp_path, {"loss": 8.0, **dict.fromkeys(names, 1.0)}, SCORES)
    assert total == {"training": [[1, 8], [2, 8], [3, 8]]}
    assert parts == {name.replace("_", " "): [[1, 1], [2, 1], [3, 1]] for name in names}
    assert found == {"detection": [[1, 0.5], [3, 0.5]], "neoplastic": [[1, 0.25], [3, 0.25]]}
    looks = {(line.get_color(), line.get_linestyle()) for line in panels[1].lines[:-1]}
    assert len(looks) == len(names)
    assert [panel.get_title() for panel in panels][:2] == ["Weighted loss", "Parts of the training loss"]
