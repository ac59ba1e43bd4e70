"""What memory a process and its children held, against blocks of known size."""

import subprocess
import sys

import pytest

from qnb import memory
from qnb.device import Device

CODE = """
from subprocess import PIPE, Popen
from sys import executable
from qnb.memory import host_peak_mib

def take(mib):
    return bytearray(b"x") * (mib << 20)

take(200)  # and give it back
peaks = [host_peak_mib()]
with Popen([executable, "-c", "block = bytearray(b'x') * (300 << 20); print(flush=True); input()"],
           stdin=PIPE, stdout=PIPE) as child:
    child.stdout.readline()
    peaks.append(host_peak_mib())
    child.stdin.write(b"\\n")
print(*peaks, host_peak_mib())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_hosts_peak_has_what_was_given_back_and_what_a_child_held():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    own, both, after = map(float, done.stdout.split())
    assert 200 < own < 260 and 300 < both - own < 340 and after == both


def test_models_are_kept_where_a_gpu_has_room_for_the_next(tmp_path, monkeypatch):
    """Three checkpoints of 1 GiB: the third does not fit beside two, and the room that they leave to work in."""
    loads, free_gib = [], [9]

    def load(folder, precision, place):
        loads.append(folder.name)
        return object()

    def ask(kind, *names):
        device = Device(kind, "", 0.0, "native", "")
        return [memory.kept(load, tmp_path / name, "nf4", device) for name in names]

    for name in "abc":
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(2**30)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free_gib[0] << 30)
    monkeypatch.setattr(memory, "release", lambda **_: None)
    with memory.models_kept():
        first, again = ask("cuda", "a", "a")
        assert first is again and ask("cuda", "b", "a")[1] is first
        ask("cpu", "a", "a")
        free_gib[0] = 6
        ask("cuda", "c", "c", "a")
        free_gib[0] = 9
        monkeypatch.setattr(memory, "planned_bytes", 1)  # batches are planned beside one model
        ask("cuda", "b", "b", "c")
    ask("cuda", "a", "a")
    assert loads == ["a", "b", *"aa", "c", "a", "b", "c", *"aa"]
