"""`torchrun --max-restarts`: a job of two processes, one of which gets a signal and later is killed, ends exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_run import write_recipe
from test_stopping import METHODS, assert_same_end

pytestmark = [pytest.mark.fault, pytest.mark.two_process, pytest.mark.slow]
HERE = Path(__file__).parent


def torchrun(restarts, *args):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # without it a restart finds nobody to meet
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(HERE / "elastic.py"), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_a_job_that_is_stopped_and_killed_ends_as_one_that_was_left_alone(tmp_path):
    train = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "use_cpu": True,
        "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip
    recipe = write_recipe(tmp_path, where=None, train=train, **METHODS)
    done = torchrun(0, "run", recipe, f"output_dir={tmp_path}/alone", "--quiet")
    assert done.returncode == 0, done.stderr[-4000:]
    done = torchrun(2, "run", recipe, f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_end(tmp_path / "run", tmp_path / "alone")
    assert "stopped by SIGTERM: checkpoint-5 is whole" in done.stderr  # both, at the step in which one got it
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(about["resumed"]) == 2
