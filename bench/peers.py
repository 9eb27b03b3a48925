"""What `recollect bench` compares with when it is installed, and how to install each: `python -m bench.peers`."""

from __future__ import annotations

from recollect.bench.peers import main

if __name__ == "__main__":
    main()
