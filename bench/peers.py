"""What `recollect bench` compares with when it is installed, and how to install each: `python -m bench.peers`."""

from __future__ import annotations

from recollect.bench.peers import PEERS


def main() -> None:
    """Print every peer: what it is beside, whether it is importable here, the pip line that leaves torch as it is."""
    for peer in PEERS:
        print(f"{peer.name}: {'importable here' if peer.here else 'not here'}")
        print(f"  beside   {', '.join(peer.beside)}")
        print(f"  needs    {peer.about}")
        print(f"  install  {peer.install}\n")
    print("scaled_dot_product_attention comes with torch and is always there (mta/sdpa).")


if __name__ == "__main__":
    main()
