import json

import torch

from qat.training.loggers import JSONLLogger, wandb_logger


def test_one_object_a_line(tmp_path):
    logger = JSONLLogger(tmp_path / "sub" / "m.jsonl")
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, 3)
    logger.log_metrics({"val/ppl": 2}, 4)
    lines = (tmp_path / "sub" / "m.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "train/loss": 0.5}, {"step": 4, "val/ppl": 2.0}]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    JSONLLogger(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_wandb_logs_into_the_given_run():
    class Run:
        id, name, _attach_id = "x", "n", None

        def define_metric(self, *args, **kwargs):
            pass

    run = Run()
    assert wandb_logger(run)._experiment is run
