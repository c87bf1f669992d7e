"""Install a PyTorch that suits this machine into the environment that runs this script.

PyTorch comes in builds per accelerator, which a plain dependency cannot choose between:

* already installed: kept as it is;
* ``KVKEEP_TORCH_SPEC`` is set: that requirement, such as ``torch==2.13.0+cpu``;
* a GPU answers: the newest ``torch>=2.6``, whose default build carries CUDA on Linux;
* no GPU: the pinned release the tests run with, and any ``torch>=2.6`` where that one has no build.

pip reads its usual settings (``PIP_INDEX_URL``, ``PIP_EXTRA_INDEX_URL``, ``pip.conf``), so a mirror
or the index of the CPU builds needs no change here. The choice is explained in
docs/decisions/0003-which-torch.md.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

MINIMUM = "torch>=2.6"
TESTED = "torch==2.13.0"


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers on this machine."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    return subprocess.run([program, "-L"], capture_output=True, check=False).returncode == 0


def candidate_specs() -> list[str]:
    """Requirements to try, best first."""
    chosen = os.environ.get("KVKEEP_TORCH_SPEC")
    if chosen:
        return [chosen]
    return [MINIMUM] if has_gpu() else [TESTED, MINIMUM]


def main() -> int:
    """Install the first requirement that can be had; 0 on success."""
    if importlib.util.find_spec("torch") is not None:
        return 0
    for spec in candidate_specs():
        print(f"installing {spec} (set KVKEEP_TORCH_SPEC to choose another build)", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", spec]
        if subprocess.run(command, check=False).returncode == 0:
            return 0
    print("kvkeep: no PyTorch could be installed; pip's reason is above.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
