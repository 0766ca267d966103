"""What the tests share: MMSEG, what mmsegmentation 1.2.2 (with mmengine 0.10.7 and torch 2.13 or
2.14, on a CPU) computes from what fill.py makes; and running a script as a user does, in processes
of its own or, faster, in this one."""
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from toy_cityscapes import draw_cityscapes

TESTS, SCRIPTS, *_ = Path(__file__).resolve().parents
MMSEG = torch.load(TESTS / "mmseg.pt", weights_only=True)
sys.path.insert(0, str(SCRIPTS))

# On the CPU, in one thread: tests compare bytes, and more threads add in another order.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for test_gpu.py
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # for the scripts' processes
CORES = torch.get_num_threads()
torch.set_num_threads(1)


def words_of(command, processes=1, restarts=0):
    """What subprocess takes for a script and its arguments; under torchrun where processes > 1."""
    options = f"--standalone --nproc_per_node={processes} --max-restarts={restarts}"
    torchrun = f"-m torch.distributed.run {options}".split() if processes > 1 else []
    script, *arguments = command.split()
    return [sys.executable, *torchrun, f"{SCRIPTS / script}", *arguments]


def run_script(command, processes=1):
    """Run a script as a user does; returns the completed process, output as text."""
    return subprocess.run(words_of(command, processes), capture_output=True, text=True, timeout=600)


def run_differently(command, options, folder):
    """run_script in two processes, where process i gets options[i] as well."""
    words = [words_of(f"{command} {more}") for more in options]
    program = folder / "one_process.py"
    program.write_text(f"import os\nwords = {words}[int(os.environ['RANK'])]\n"
                       "os.execv(words[0], words)\n")
    return run_script(f"{program}", processes=2)


@pytest.fixture(scope="session")
def beside():
    """beside(function, *arguments) returns a future of a call that runs while tests go on here."""
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
    """run_here(command) is run_script in this process; the exit code must be one of `codes`."""
    def run(command, codes=(0,)):
        monkeypatch.setattr(sys, "argv", words_of(command)[1:])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.exit(0)
        code, (out, err) = end.value.code, capsys.readouterr()
        if isinstance(code, str):  # Python prints it and exits with 1
            code, err = 1, f"{err}{code}\n"
        assert code in codes, err
        return subprocess.CompletedProcess(command, code, out, err)
    return run


@pytest.fixture
def mistake(run_here):
    """mistake(command, *words): it must end with code 1 or 2, and one sentence with the words."""
    def check(command, *words):
        sentence = run_here(command, codes=(1, 2)).stderr.splitlines()[-1]
        assert sentence.startswith(f"{command.split()[0]}: "), sentence
        for word in words:
            assert word in sentence, sentence
    return check


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of drawn street scenes: 8 to train, 5 to validate, 2 to test, 64x128."""
    return draw_cityscapes(tmp_path_factory.mktemp("toy") / "data",
                           {"train": 8, "val": 5, "test": 2}, (64, 128))
