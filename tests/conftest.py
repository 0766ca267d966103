"""What the tests share: the scripts on the path, mmsegmentation's numbers, and running a script as a user does."""
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

# What mmsegmentation 1.2.2 computed (with mmengine 0.10.7 and torch 2.13, on a CPU) on weights, inputs and labels that fill.py
# makes from seeds. models: logits, losses, gradients; sgd20: 20 steps of training; lr; preprocess; init; metric.
MMSEG = torch.load(TESTS / "mmseg.pt", weights_only=True)


def run_script(*command, processes=1, restarts=0, timeout=120, **options):
    """Run a script as a user does, under torchrun where processes > 1; returns the completed process, output as text."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    torchrun = torchrun if processes > 1 else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    return subprocess.run([sys.executable, *torchrun, SCRIPTS / command[0], *map(str, command[1:])], capture_output=True,
                          text=True, timeout=timeout, env=environment, **options)


def assert_mistake(process, *words):
    """A user's mistake ends with exit code 2 and one sentence on stderr, without a traceback, which holds the words."""
    assert process.returncode == 2, process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def mistake(monkeypatch, capsys):
    """Call mistake(script, *arguments, words=[...]): run the script's own entry point in this process (starting Python takes
    seconds); it must end like a user's mistake, as assert_mistake says."""
    leave, pid = os._exit, os.getpid()

    def check(script, *arguments, words):
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code) if os.getpid() == pid else leave(code))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            evaluate.run(module.main, "")
        assert_mistake(subprocess.CompletedProcess(arguments, end.value.code, stderr=capsys.readouterr().err), *words)

    return check


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of drawn street scenes: 8 to train, 5 to validate, 2 to test, 64x128 pixels."""
    return draw_cityscapes(tmp_path_factory.mktemp("toy") / "data", {"train": 8, "val": 5, "test": 2}, (64, 128))
