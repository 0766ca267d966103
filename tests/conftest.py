"""What the tests share: the scripts on the path, mmsegmentation's numbers, and running a script as
a user does, in a process of its own or, faster, in this one."""
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_cityscapes import draw_cityscapes

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent
sys.path.insert(0, str(SCRIPTS))

# On the CPU, in one thread each: the number of threads changes the order of sums, and tests compare
# what several processes compute to the byte. (Besides, small networks are slower in more.)
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for test_gpu.py
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # for the scripts' processes
CORES = torch.get_num_threads()
torch.set_num_threads(1)

# What mmsegmentation 1.2.2 computed (with mmengine 0.10.7 and torch 2.13 or 2.14, on a CPU) on
# weights, inputs and labels that fill.py makes from seeds. models: logits, losses, gradients;
# sgd20: 20 steps of training; lr; preprocess; init; metric.
MMSEG = torch.load(TESTS / "mmseg.pt", weights_only=True)


def words_of(command, processes=1, restarts=0):
    """What subprocess takes, for a script and its arguments as a user types them; under torchrun
    where processes > 1."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes} "
    torchrun = (torchrun + f"--max-restarts={restarts}").split() if processes > 1 else []
    script, *arguments = command.split()
    return [sys.executable, *torchrun, str(SCRIPTS / script), *arguments]


def run_script(command, processes=1):
    """Run a script as a user does; returns the completed process, output as text."""
    return subprocess.run(words_of(command, processes), capture_output=True, text=True, timeout=600)


def run_differently(command, options, folder):
    """Run a script in two processes under torchrun, each with more options of its own: options[0]
    for process 0, options[1] for process 1."""
    shell = folder / "one_process.sh"
    shell.write_text(f"[ $RANK = 0 ] && more='{options[0]}' || more='{options[1]}'\n"
                     f"exec {sys.executable} {SCRIPTS}/{command} $more\n")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --no-python sh"
    return subprocess.run([sys.executable, *torchrun.split(), str(shell)], capture_output=True,
                          text=True, timeout=600)


@pytest.fixture(scope="session")
def beside():
    """beside(function, *arguments) calls the function in a thread and returns a future: scripts run
    on a second core while tests go on here."""
    pool = ThreadPoolExecutor(2)
    yield pool.submit
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def all_cores():
    """For what is large, and compared to a tolerance."""
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(command) runs a script from its first line to its last in this process (starting
    Python and torch takes seconds), which must end with one of `codes`; returns its stdout and
    stderr."""
    def run(command, codes=(0,)):
        script, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        if isinstance(code, str):  # Python prints it and exits with 1
            code, err = 1, err + code + "\n"
        assert code in codes, err
        return SimpleNamespace(stdout=out, stderr=err)

    return run


@pytest.fixture
def mistake(run_here):
    """mistake(command, *words): the script must end with exit code 1 or 2 and, as the last line on
    stderr, one sentence after its name that holds the words; without a traceback."""
    def check(command, *words):
        process = run_here(command, codes=(1, 2))
        assert "Traceback" not in process.stderr, process.stderr
        sentence = process.stderr.splitlines()[-1]
        assert sentence.startswith(f"{command.split()[0]}: "), process.stderr
        for word in words:
            assert word in sentence, sentence

    return check


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of drawn street scenes: 8 to train, 5 to validate, 2 to test, 64x128."""
    return draw_cityscapes(tmp_path_factory.mktemp("toy") / "data",
                           {"train": 8, "val": 5, "test": 2}, (64, 128))
