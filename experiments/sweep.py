"""Time layouts side by side on this machine, and draw what comes out; `meshdiff sweep` by another name.

Every layout of 1, 2, 4, ... ranks:   python experiments/sweep.py
Those that run.py would choose:       python experiments/sweep.py --world-sizes 1 8 --layouts auto
Of Wan:                               python experiments/sweep.py --model wan --checkpoint FOLDER --frames 17 33
Of a pipeline that makes clips:       python experiments/sweep.py --model diffusers --checkpoint FOLDER --frames 17
Go on, or add sizes and repeats:      python experiments/sweep.py --out runs/sweep --resume --repeats 5
"""

import sys

from meshdiff.cli.main import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
