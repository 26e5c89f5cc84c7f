"""Make one clip from a prompt, on one device or on many; `meshdiff run` by another name.

One process:      python experiments/run.py
Two, guidance:    torchrun --nproc-per-node 2 experiments/run.py --cfg 2 --prompt "a 7 moving left"
Eight:            torchrun --nproc-per-node 8 experiments/run.py --cp 4 --cfg 2
Eight, simulated: python experiments/run.py --cp 4 --cfg 2 --simulate
Eight, Wan:       torchrun --nproc-per-node 8 experiments/run.py --model wan --checkpoint FOLDER --cp 4 --cfg 2
"""

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a lost store is pages of C++ frames above the line about it

from meshdiff.cli.main import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
