"""What the tests share: MMSEG, what mmsegmentation 1.2.2 computes from what fill.py makes (see
record_mmseg.py); a small data set; and running a script as a user does, in processes of its own."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_cityscapes import draw_cityscapes

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent
MMSEG = torch.load(TESTS / "mmseg.pt", weights_only=True)
sys.path.insert(0, str(SCRIPTS))

# On the CPU, in one thread: tests compare bytes, and more threads add in another order.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for test_gpu.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that run_script starts
CORES = torch.get_num_threads()
torch.set_num_threads(1)


@pytest.fixture
def all_cores():
    """For what is large, and compared to a tolerance."""
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of drawn street scenes: 8 to train, 5 to validate, 2 to test, 64x128."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    return draw_cityscapes(folder, {"train": 8, "val": 5, "test": 2}, (64, 128))


def words_of(command, processes=1, restarts=0):
    """What subprocess takes for a script and its arguments; under torchrun where processes > 1."""
    script, *arguments = command.split()
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                  f"--max-restarts={restarts}"]
    return [*words, str(SCRIPTS / script), *arguments]


def run_script(command, processes=1):
    """Run a script as a user does, to its end. Returns the completed process, output as text."""
    return subprocess.run(words_of(command, processes), capture_output=True, text=True, timeout=600)


def sentence_of(process):
    """The last line that a script printed to standard error, where it must have refused."""
    assert process.returncode != 0
    return process.stderr.strip().splitlines()[-1]
