"""A picture of a training run from whatever log there is."""
import json

import pytest

from conftest import run
from evals.plot import losses_of, read_log

ENTRY = {"stage": "post-training 1", "step": 1, "text_loss": 2.0, "text_accuracy": 0.0, "semantic_loss": 3.0,
         "lr": 1e-3,
         "tokens_per_second": 100.0, "seconds": 1.5, "loss": 5.0}


@pytest.mark.parametrize("broken", ['{"stage": "post-training 1", "st',
                                    '{"stage": "a"{"stage": "post-training 1", "step": 3}',
                                    "[1]", '"text"', "3", '{"step": 2}', '{"stage": "x", "step": "late"}',
                                    "\x00\xff", ""])
def test_a_line_that_is_not_whole_is_skipped_with_one_warning(tmp_path, broken, capsys):
    (tmp_path / "log.jsonl").write_text(
        f"{json.dumps(ENTRY)}\n{broken}\n{json.dumps(ENTRY | {'step': 2})}\n{broken}\n")
    assert [step for _, step, _ in read_log(str(tmp_path / "log.jsonl"))] == [1, 2]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "skipped 2 line(s)" in err


def test_a_torn_log_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [ENTRY, ENTRY | {"step": 2, "split": "held-out"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines)
                                        + '{"stage": "post')
    code, out, err = run("evals.plot", tmp_path)
    assert code == 0 and out.startswith("Wrote") and err.count("\n") == 1, err


def test_a_log_without_a_whole_line_is_an_error(tmp_path):
    (tmp_path / "log.jsonl").write_text("{")
    code, _, err = run("evals.plot", tmp_path)
    assert code == 1 and err.splitlines()[-1].startswith("error: ")


def test_only_losses_and_the_accuracy_are_drawn():
    assert list(losses_of(ENTRY)) == ["text_loss", "text_accuracy", "semantic_loss"]
