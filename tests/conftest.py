"""What the tests share: the scripts on the path, mmsegmentation's numbers, and running a script as
a user does."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_cityscapes import draw_cityscapes

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent
sys.path.insert(0, str(SCRIPTS))

import evaluate  # noqa: E402

# What mmsegmentation 1.2.2 computed (with mmengine 0.10.7 and torch 2.13, on a CPU) on weights,
# inputs and labels that fill.py makes from seeds. models: logits, losses, gradients; sgd20: 20
# steps of training; lr; preprocess; init; metric.
MMSEG = torch.load(TESTS / "mmseg.pt", weights_only=True)


def words_of(command, processes=1, restarts=0):
    """What subprocess takes, for a script and its arguments as a user types them; under torchrun
    where processes > 1."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes} "
    torchrun = (torchrun + f"--max-restarts={restarts}").split() if processes > 1 else []
    script, *arguments = command.split()
    return [sys.executable, *torchrun, SCRIPTS / script, *arguments]


def run_script(command, processes=1, restarts=0, timeout=120, **options):
    """Run a script as a user does; returns the completed process, output as text."""
    command = words_of(command, processes, restarts)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, **options
    )


def assert_mistake(process, *words):
    """A user's mistake ends with exit code 2 and one sentence on stderr, without a traceback, which
    holds the words."""
    assert process.returncode == 2, process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def mistake(monkeypatch, capsys):
    """mistake(command, *words): run the script's own entry point in this process (starting Python
    takes seconds); it must end like a user's mistake, as assert_mistake says."""
    leave, pid = os._exit, os.getpid()

    def exit_from_here(code):  # a forked worker really leaves
        sys.exit(code) if os.getpid() == pid else leave(code)

    def check(command, *words):
        module = importlib.import_module(command.split(".py")[0])
        monkeypatch.setattr(sys, "argv", command.split())
        monkeypatch.setattr(os, "_exit", exit_from_here)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            evaluate.run(module.main, "")
        errors = capsys.readouterr().err
        assert_mistake(subprocess.CompletedProcess(command, end.value.code, stderr=errors), *words)

    return check


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of drawn street scenes: 8 to train, 5 to validate, 2 to test, 64x128
    pixels."""
    return draw_cityscapes(
        tmp_path_factory.mktemp("toy") / "data", {"train": 8, "val": 5, "test": 2}, (64, 128)
    )
