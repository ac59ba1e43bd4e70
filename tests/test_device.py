"""Which device is measured on is the caller's to say, and everything below means that one."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pynvml
import pytest
import torch

from qnb import device, doctor
from qnb.errors import InputError
from qnb.session import Session


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two cards; returns those that torch was told to mean."""
    chosen = []
    monkeypatch.delenv(device.CHOICE, raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cards = [SimpleNamespace(name=f"card {place}", total_memory=2**34, major=8 - place, minor=0) for place in range(2)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: cards[int(str(place)[-1])])
    return chosen


def test_a_gpu_is_taken_by_its_number(two_gpus, tmp_path):
    assert device.detect().place == device.detect("cuda").place == "cuda:0"
    session = Session(output=tmp_path, device="cuda:1")
    found = session.device
    assert (found.kind, found.place, found.name, found.memory_mib) == ("cuda", "cuda:1", "card 1", 2**14)
    assert (device.detect().bf16, found.bf16) == ("native", "emulated")  # each by its own card
    assert (device.detect().half, found.half, session.half) == ("bfloat16", "float16", "float16")
    assert replace(found, kind="cpu").half == "float32"
    assert two_gpus == []  # whoever only asks, as the process that starts the notebooks, takes no memory of it
    with session.exclusive():
        assert two_gpus == [1]
    device.detect("cpu").use()
    assert two_gpus == [1]


@pytest.mark.parametrize("asked", ["cuda:2", "gpu", "cuda:", "cuda:-1", 1, ""])
def test_a_device_that_is_none_is_refused(asked, two_gpus):
    with pytest.raises(InputError, match="sees 2 NVIDIA GPUs" if asked == "cuda:2" else "give 'auto', 'cpu', 'cuda'"):
        device.detect(asked)


def test_the_environment_names_what_auto_means(two_gpus, monkeypatch):
    monkeypatch.setenv(device.CHOICE, "cuda:1")
    assert device.detect().place == "cuda:1" and device.detect("cuda:0").place == "cuda:0"
    monkeypatch.setenv(device.CHOICE, "cuda:7")
    with pytest.raises(InputError, match="'cuda:7'"):
        device.detect()


NO_TEXT = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text")


@pytest.mark.parametrize("error", [pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION), NO_TEXT], ids=repr)
@pytest.mark.parametrize("call", ["nvmlInit", "nvmlSystemGetDriverVersion"])
def test_a_gpu_that_nvml_does_not_know_is_taken(call, error, two_gpus, monkeypatch, capsys, tmp_path):
    """PyTorch names the GPUs; NVML only reads them (Jetson, WSL, some containers have none)."""
    monkeypatch.setattr(pynvml, call, Mock(side_effect=error))
    for place in ("auto", "cuda:1"):
        assert (device.detect(place).kind, device.detect(place).driver) == ("cuda", "")
    assert "driver not known" in Session(output=tmp_path).facts()["device"]
    monkeypatch.setattr(doctor, "can_quantize", lambda place: place == "cuda:0")
    doctor.doctor()
    assert "not known" in capsys.readouterr().out


@pytest.mark.gpu
def test_who_only_asks_takes_no_context_of_a_gpu():
    """The process that starts the notebooks stands beside the one that measures: it would be flagged as another."""
    code = (
        "import torch; from qnb import device; from qnb.speed import monitor; here = device.detect();"
        "held = lambda: int(monitor.Sensor(here.place).sample()['gpu_processes']);"
        "asked = held(); here.use(); torch.zeros(1, device='cuda'); print(held() - asked)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["1"]  # its context came with the tensor, and not before
