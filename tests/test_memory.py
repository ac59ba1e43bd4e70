"""What memory a process and its children held, against blocks of known size."""

import subprocess
import sys

import pytest

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
