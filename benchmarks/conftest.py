"""What every result says of where it was measured. Run with `pytest benchmarks/ --benchmark-json=FILE`."""

import os

import torch
import torchvision


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""  # the name of a machine is nobody's business
    machine_info["versions"] = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
